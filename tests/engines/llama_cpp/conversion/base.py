import json


class ModelBase:
    def __init__(self, folder, file):
        import gguf

        self.fname_out = file
        self.hparams = json.loads((folder / "config.json").read_text())
        self.rope_parameters = self.hparams["rope_parameters"]
        self.gguf_writer = gguf.GGUFWriter(None, "llama")

    def generate_extra_tensors(self):
        return ()

    def set_gguf_parameters(self):
        import gguf

        if self.rope_parameters.get("rope_type") == "longrope":
            self.gguf_writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)
        self.gguf_writer.add_rope_freq_base(self.rope_parameters["rope_theta"])

    def write(self):
        for name, tensor in self.generate_extra_tensors():
            self.gguf_writer.add_tensor(name, tensor.numpy())
        self.set_gguf_parameters()
        self.gguf_writer.write_header_to_file(path=self.fname_out)
        self.gguf_writer.write_kv_data_to_file()
        self.gguf_writer.write_tensors_to_file()
        self.gguf_writer.close()


class TextModel(ModelBase):
    def get_vocab_base_pre(self, tokenizer):
        if tokenizer == "unheard of":
            raise NotImplementedError
        return tokenizer
