"""The method: tensors in, tensors out. Statistics, groups, merges and refit; knows neither PEFT nor the adapter."""
