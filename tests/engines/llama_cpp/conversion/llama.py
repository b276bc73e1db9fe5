from .base import TextModel


class LlamaModel(TextModel):
    pass
