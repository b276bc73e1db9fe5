"""The adapter: what PEFT would take. Layers, the tuner, and the way to a plain checkpoint; knows no statistics."""
