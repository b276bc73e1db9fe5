"""AsymGQATrainer against SFTTrainer and against an independent float64 reference, on tiny random models."""

from __future__ import annotations

import copy
import re
import shutil

import pytest
import torch
from datasets import Dataset
from models import (
    GROUPS,
    LAYERS,
    VOCAB,
    adapter_config,
    assert_equal,
    prompt,
    random_model,
    tiny_config,
    tiny_llama,
    tiny_phi,
    wrap,
)
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from torch._dynamo.utils import counters
from torch.nn import functional as F
from transformers import (
    BitsAndBytesConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    TrainerCallback,
)
from trl import SFTConfig, SFTTrainer

from asymgqa_peft import AsymGQATrainer, distillation, initialize_asymgqa_weights
from asymgqa_peft.distillation import OutputLayer, distillation_loss
from asymgqa_peft.trainer import base_model_mode

# TRL 1.16 and PEFT 0.21 still use the names that transformers 5.23 renames to activation_checkpointing.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")

SINGLES = [[[head] for head in range(6)]] * LAYERS  # each KV head its own group: the base as it is
SHARED = re.compile(r"lora_(kv|query_gain|query_mix|value_mix|norm)\.")


@pytest.fixture(scope="module")
def tokenizer():
    words = ["<pad>", "<eos>", "<unk>"] + [f"w{i}" for i in range(VOCAB - 3)]
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def tiny_gemma2():
    """MHA of 6 heads; a tight softcap, so that logits without it would be others."""
    sizes = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 6, "sliding_window": 16}
    return random_model(tiny_config("gemma2", **sizes, final_logit_softcapping=1.0))


def adapted(base=None, **changes):
    """An adapter that already differs from its base everywhere, on `tiny_llama` if no other base is given."""
    return wrap(base or tiny_llama(), GROUPS["llama"], **changes)


def documents(count=8, seed=0, shortest=5, longest=20):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest, (count,), generator=generator).tolist()
    return [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for length in lengths]


def token_dataset(docs):
    return Dataset.from_dict({"input_ids": docs})


def build(model, dataset, tokenizer, path, trainer_class=AsymGQATrainer, trainer_options=None, **options):
    defaults = dict(
        output_dir=str(path),
        use_cpu=True,
        bf16=False,
        report_to=[],
        per_device_train_batch_size=4,
        max_steps=3,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        gradient_checkpointing=False,
        disable_tqdm=True,
        max_length=32,
        seed=3,
    )
    return trainer_class(
        model=model,
        args=SFTConfig(**defaults | options),
        train_dataset=dataset,
        processing_class=tokenizer,
        **(trainer_options or {}),
    )


def train(trainer):
    """Train; the log entries of training steps."""
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def train_losses(trainer):
    trainer.train()
    return logged_losses(trainer)


def parameters(model):
    """Copies of all parameters, by name."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def shared_parameters(model):
    """Copies of the parameters of shared K/V heads, by name."""
    return {name: values for name, values in parameters(model).items() if SHARED.search(name)}


def logged_losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def first_loss(trainer, **arguments):
    batch = next(iter(trainer.get_train_dataloader()))
    return trainer.compute_loss(trainer.model, batch, **arguments)


def loss_from_full_logits(model, docs, weight, temperature, labels=None):
    """Mean loss over tokens, in float64 from the model's own logits, one unpadded document at a time."""
    total, count = 0.0, 0
    for doc, targets in zip(docs, labels or docs, strict=True):
        ids = torch.tensor([doc])
        with torch.no_grad():
            student = model(input_ids=ids).logits[0, :-1].double()
            with model.disable_adapter():
                teacher = model(input_ids=ids).logits[0, :-1].double()
        for position, target in enumerate(targets[1:]):
            if target == -100:
                continue
            p = torch.softmax(teacher[position] / temperature, 0)
            q = torch.softmax(student[position] / temperature, 0)
            divergence = (p * (p.log() - q.log())).sum()
            cross_entropy = -torch.log_softmax(student[position], 0)[target]
            total += (1 - weight) * cross_entropy + weight * temperature**2 * divergence
            count += 1
    return float(total / count)


def reference(model, docs, weight=1.0, temperature=1.0, labels=None):
    """The same of a float64 copy of the model."""
    return loss_from_full_logits(copy.deepcopy(model).double().eval(), docs, weight, temperature, labels)


# ---- Weight 0: SFTTrainer ----


@pytest.mark.parametrize("accumulation", [1, 2])
def test_weight_zero_is_sft_to_the_last_bit(tokenizer, tmp_path, accumulation):
    options = dict(max_steps=4, per_device_train_batch_size=2, gradient_accumulation_steps=accumulation)
    ours = {"distillation_weight": 0.0, "kv_learning_rate_scale": 1.0}
    logs, weights = [], []
    for trainer_class, extra in ((SFTTrainer, {}), (AsymGQATrainer, ours)):
        model = adapted()
        dataset = token_dataset(documents(16))
        logs.append(train(build(model, dataset, tokenizer, tmp_path, trainer_class, extra, **options)))
        weights.append(model.state_dict())
    assert [entry["loss"] for entry in logs[0]] == [entry["loss"] for entry in logs[1]]
    assert logs[0][0].keys() == logs[1][0].keys()
    assert_equal(weights[1], weights[0])
    assert logs[0][0]["loss"] != logs[0][-1]["loss"]


# ---- The loss against the reference ----


@pytest.mark.parametrize("weight, temperature", [(1.0, 1.0), (1.0, 2.5), (0.3, 1.0), (0.6, 0.5)])
def test_padded_batch_matches_float64_reference(tokenizer, tmp_path, weight, temperature):
    docs, model = documents(4), adapted()
    expected = reference(model, docs, weight, temperature)
    extra = {"distillation_weight": weight, "temperature": temperature}
    trainer = build(model, token_dataset(docs), tokenizer, tmp_path, trainer_options=extra)
    assert expected > 0.01
    assert len({len(doc) for doc in docs}) > 1  # padding is real
    assert first_loss(trainer).item() == pytest.approx(expected, rel=1e-5)


def test_temperature_changes_the_loss():
    docs, model = documents(4), adapted()
    assert reference(model, docs, 1.0, 1.0) != pytest.approx(reference(model, docs, 1.0, 0.5), rel=0.1)


def test_completion_only_matches_reference(tokenizer, tmp_path):
    rows, docs, labels = [], [], []
    for doc in documents(4, shortest=6):
        prompt, completion = doc[:3], doc[3:]
        rows.append({"prompt": tokenizer.decode(prompt), "completion": " " + tokenizer.decode(completion)})
        docs.append([*prompt, *completion, tokenizer.eos_token_id])
        labels.append([-100] * len(prompt) + [*completion, tokenizer.eos_token_id])
    model = adapted()
    expected, everywhere = reference(model, docs, labels=labels), reference(model, docs)
    trainer = build(model, Dataset.from_list(rows), tokenizer, tmp_path)
    assert first_loss(trainer).item() == pytest.approx(expected, rel=1e-5)
    assert expected != pytest.approx(everywhere, rel=1e-3)


def test_packing_matches_reference(tokenizer, tmp_path):
    docs, model = documents(6, longest=12), adapted()
    expected = reference(model, docs)
    trainer = build(
        model, token_dataset(docs), tokenizer, tmp_path, packing=True, max_length=48, per_device_train_batch_size=8
    )
    assert len(trainer.train_dataset) < len(docs)
    assert first_loss(trainer).item() == pytest.approx(expected, rel=1e-5)


def test_softcapped_logits_match_reference(tokenizer, tmp_path):
    docs, model = documents(4), adapted(tiny_gemma2())
    expected = reference(model, docs, 0.5)
    uncapped = copy.deepcopy(model)  # before the trainer patches the model's forward
    uncapped.config.final_logit_softcapping = None
    assert reference(uncapped, docs, 0.5) != pytest.approx(expected, rel=5e-2)
    trainer = build(model, token_dataset(docs), tokenizer, tmp_path, trainer_options={"distillation_weight": 0.5})
    assert first_loss(trainer).item() == pytest.approx(expected, rel=1e-5)


def test_output_layer_with_a_bias_matches_reference(tokenizer, tmp_path):
    docs, model = documents(4), adapted(tiny_phi())
    expected = reference(model, docs, 0.5)
    trainer = build(model, token_dataset(docs), tokenizer, tmp_path, trainer_options={"distillation_weight": 0.5})
    assert first_loss(trainer).item() == pytest.approx(expected, rel=1e-5)
    model.get_output_embeddings().bias.data.zero_()
    assert reference(model, docs, 0.5) != pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.filterwarnings("ignore:.*MatMul8bitLt.*")
def test_quantised_output_layer_matches_its_own_logits(tokenizer, tmp_path, bits):
    pytest.importorskip("bitsandbytes")
    tiny_llama(hidden_size=192, head_dim=32).save_pretrained(tmp_path)
    options = {4: {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32}, 8: {"load_in_8bit": True}}
    everything = BitsAndBytesConfig(**options[bits], llm_int8_skip_modules=["nothing"])  # by default, not lm_head
    base = LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=everything, device_map="cpu")
    docs, model = documents(4), adapted(base)
    extra = {"distillation_weight": 0.5, "temperature": 2.0}
    trainer = build(model, token_dataset(docs), tokenizer, tmp_path, trainer_options=extra)
    assert not model.get_output_embeddings().weight.is_floating_point()
    # In training mode, because bitsandbytes repacks weights for inference on a CPU; there is no dropout.
    expected = loss_from_full_logits(model.train(), docs, 0.5, 2.0)
    for _ in range(2):  # the first batch, which checks the output layer, and one after it
        assert first_loss(trainer).item() == pytest.approx(expected, rel=1e-3 if bits == 8 else 1e-5)


@pytest.mark.parametrize("make, options", [(tiny_llama, {}), (tiny_llama, {"bf16": True}), (tiny_gemma2, {})])
def test_the_output_layer_never_sees_more_than_the_last_position(tokenizer, tmp_path, make, options):
    model = adapted(make())
    trainer = build(model, token_dataset(documents(16)), tokenizer, tmp_path, **options)
    lengths = []
    model.get_output_embeddings().register_forward_hook(lambda _, args, logits: lengths.append(logits.shape[1]))
    train(trainer)
    assert lengths == [1] * 6  # teacher and student, three steps


def test_teacher_uses_the_base_output_layer(tokenizer, tmp_path):
    docs, model = documents(4), adapted(modules_to_save=["lm_head"])
    model.get_output_embeddings().modules_to_save["default"].weight.data *= 1.3
    expected = reference(model, docs)
    trainer = build(model, token_dataset(docs), tokenizer, tmp_path)
    loss = first_loss(trainer)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()
    output_layer = model.get_output_embeddings()
    assert output_layer.modules_to_save["default"].weight.grad.abs().sum() > 0
    assert output_layer.original_module.weight.grad is None


class ScaledLlama(LlamaForCausalLM):
    """Logits that no field of the config explains."""

    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        outputs.logits = outputs.logits * 0.5
        return outputs


class WrappedLayer(torch.nn.Module):
    """An output layer that is not a linear layer."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear

    def forward(self, hidden):
        return self.linear(hidden)


def model_with_scaled_logits():
    return adapted(ScaledLlama(tiny_llama(initializer_range=0.2).config))


def model_with_wrapped_output_layer():
    model = adapted()
    model.base_model.model.lm_head = WrappedLayer(model.base_model.model.lm_head)
    return model


@pytest.mark.parametrize(
    "make, found",
    [
        (model_with_scaled_logits, "Linear, but its weight, bias and softcap do not reproduce.*by up to .*where"),
        (model_with_wrapped_output_layer, "WrappedLayer, but it is not a linear layer"),
    ],
)
def test_output_layer_that_does_not_explain_the_logits_is_refused(tokenizer, tmp_path, make, found):
    model = make()
    before = parameters(model)
    trainer = build(model, token_dataset(documents(16)), tokenizer, tmp_path)
    with pytest.raises(ValueError, match=f"{found}.*distillation_weight=0, or .*plain linear layer"):
        trainer.train()
    assert_equal(parameters(model), before)
    assert trainer.state.global_step == 0


def test_identity_adapter_has_zero_loss_and_gradient(tokenizer, tmp_path):
    model = get_peft_model(tiny_llama(), adapter_config(SINGLES))
    trainer = build(model, token_dataset(documents(4)), tokenizer, tmp_path)
    loss = first_loss(trainer)
    assert loss.item() == 0.0
    loss.backward()
    for name, parameter in model.named_parameters():
        assert not parameter.requires_grad or parameter.grad.abs().max() == 0, name


# ---- The chunked function ----


def chunk_case(bias):
    generator = torch.Generator().manual_seed(2)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    return {
        "student": normal(50, 16),
        "teacher": normal(50, 16),
        "labels": torch.randint(0, 37, (50,), generator=generator),
        "student_weight": normal(37, 16),
        "teacher_weight": normal(37, 16),
        "bias": normal(37) if bias else None,
        "teacher_bias": normal(37) if bias else None,
    }


def chunked(case, softcap, rows):
    """Loss, sums and gradients of student, weight and bias, by `distillation_loss`."""
    student, weight = case["student"].clone().requires_grad_(), case["student_weight"].clone().requires_grad_()
    leaves = [student, weight]
    bias = None
    if case["bias"] is not None:
        bias = case["bias"].clone().requires_grad_()
        leaves.append(bias)
    loss, sums = distillation_loss(
        student,
        case["teacher"],
        case["labels"],
        student_layer=OutputLayer(weight, bias, softcap),
        teacher_layer=OutputLayer(case["teacher_weight"], case["teacher_bias"], softcap),
        weight=0.7,
        temperature=1.7,
        chunk_bytes=4 * 37 * rows,
    )
    (3 * loss).backward()
    return loss, sums, [leaf.grad for leaf in leaves]


def full(case, softcap):
    """The same in float64, from all logits at once."""
    student, weight = case["student"].double().requires_grad_(), case["student_weight"].double().requires_grad_()
    leaves = [student, weight]
    s = student @ weight.T
    t = case["teacher"].double() @ case["teacher_weight"].double().T
    if case["bias"] is not None:
        bias = case["bias"].double().requires_grad_()
        leaves.append(bias)
        s, t = s + bias, t + case["teacher_bias"].double()
    if softcap is not None:
        s, t = softcap * torch.tanh(s / softcap), softcap * torch.tanh(t / softcap)
    ce = F.cross_entropy(s, case["labels"], reduction="sum")
    kl = F.kl_div((s / 1.7).log_softmax(-1), (t / 1.7).log_softmax(-1), log_target=True, reduction="sum")
    loss = 0.3 * ce + 0.7 * 1.7**2 * kl
    (3 * loss).backward()
    q = s.softmax(-1)
    sums = [1.7**2 * kl, ce, -(q * q.log()).sum(), (s.argmax(-1) == case["labels"]).sum()]
    return loss, sums, [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 7, 50, 1000])
def test_chunks_equal_the_full_computation(rows, bias, softcap):
    case = chunk_case(bias)
    loss, sums, gradients = chunked(case, softcap, rows)
    expected_loss, expected_sums, expected_gradients = full(case, softcap)
    torch.testing.assert_close(loss.double(), expected_loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(sums.statistics.double(), torch.stack(expected_sums).double(), rtol=1e-5, atol=1e-5)
    for gradient, expected in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient.double(), expected, rtol=1e-4, atol=1e-4)


def test_bfloat16_error_is_no_worse_than_torch():
    case = chunk_case(False)
    for name in ("student", "teacher", "student_weight", "teacher_weight"):
        case[name] = case[name].bfloat16()
    expected = full(case, None)[0].item()
    s = (case["student"].float() @ case["student_weight"].float().T).bfloat16().float()
    t = (case["teacher"].float() @ case["teacher_weight"].float().T).bfloat16().float()
    ce = F.cross_entropy(s, case["labels"], reduction="sum")
    kl = F.kl_div((s / 1.7).log_softmax(-1), (t / 1.7).log_softmax(-1), log_target=True, reduction="sum")
    plain = (0.3 * ce + 0.7 * 1.7**2 * kl).item()
    assert abs(chunked(case, None, 8)[0].item() - expected) <= abs(plain - expected) + 1e-6 * abs(expected)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_padded_chunks_change_nothing(monkeypatch, softcap):
    case = chunk_case(True)
    expected = chunked(case, softcap, 7)
    # What CUDA does, without compiling.
    monkeypatch.setattr(distillation, "chunk_terms_for", lambda device: (distillation.chunk_terms, True))
    padded = chunked(case, softcap, 7)
    torch.testing.assert_close(padded[0], expected[0])
    torch.testing.assert_close(padded[1].statistics, expected[1].statistics)
    torch.testing.assert_close(padded[2], expected[2])


def test_no_position_counts_gives_zero():
    case = chunk_case(False)
    case.update(student=case["student"][:0], teacher=case["teacher"][:0], labels=case["labels"][:0])
    loss, sums, gradients = chunked(case, None, 8)
    assert loss.item() == 0 and sums.tokens == 0
    assert gradients[1].abs().sum() == 0


def test_chunk_size_does_not_change_training(tokenizer, tmp_path):
    losses = []
    for rows in (3, 10_000):
        trainer = build(adapted(), token_dataset(documents(16)), tokenizer, tmp_path)
        trainer.chunk_bytes = 4 * VOCAB * rows
        losses.append(train_losses(trainer))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


# ---- Trajectories ----


@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_accumulation_equals_one_large_batch(tokenizer, tmp_path, weight):
    runs, weights = [], []
    for batch, steps in ((4, 1), (1, 4)):
        model = adapted()
        trainer = build(
            model,
            token_dataset(documents(16, shortest=3, longest=24)),
            tokenizer,
            tmp_path,
            trainer_options={"distillation_weight": weight},
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=steps,
            max_steps=4,
            optim="sgd",
            learning_rate=0.05,
            max_grad_norm=0.0,
        )
        runs.append(train(trainer))
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad]))
    for key in ("loss", "distillation_loss", "sft_loss", "entropy", "mean_token_accuracy", "num_tokens"):
        assert [x[key] for x in runs[0]] == pytest.approx([x[key] for x in runs[1]], rel=1e-4)
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-6)
    for entry in runs[0] + runs[1]:  # each log covers its own step, and the parts make the whole
        parts = (1 - weight) * entry["sft_loss"] + weight * entry["distillation_loss"]
        assert entry["loss"] == pytest.approx(parts, rel=1e-5)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_gives_the_same_losses(tokenizer, tmp_path, reentrant):
    losses = []
    checkpointing = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    for options in ({}, checkpointing):
        trainer = build(adapted(), token_dataset(documents(16)), tokenizer, tmp_path, **options)
        losses.append(train_losses(trainer))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][0] != pytest.approx(losses[0][-1], rel=1e-2)


def test_distillation_lowers_the_loss_and_leaves_the_base_untouched(tokenizer, tmp_path):
    model = adapted()
    before = parameters(model)
    logs = train(build(model, token_dataset(documents(32)), tokenizer, tmp_path, max_steps=30, num_train_epochs=9))
    assert logs[-1]["loss"] < 0.5 * logs[0]["loss"]
    for name, values in parameters(model).items():
        assert torch.equal(values, before[name]) == ("lora_" not in name), name


def test_resumed_run_ends_with_the_same_weights(tokenizer, tmp_path):
    options = dict(max_steps=4, save_strategy="steps", save_steps=2, lr_scheduler_type="linear")
    dataset = token_dataset(documents(16))
    whole, resumed = adapted(), adapted()
    train(build(whole, dataset, tokenizer, tmp_path, **options))
    trainer = build(resumed, dataset, tokenizer, tmp_path, **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    rates = [group["lr"] for group in trainer.optimizer.param_groups]
    assert sorted(set(rates)) == rates[:1]  # linear decay has brought every group to 0
    assert_equal(parameters(resumed), parameters(whole))


def test_a_fresh_wrap_resumes_with_the_groups_of_its_checkpoint(tokenizer, tmp_path):
    """The groups were found by a search; a fresh wrap starts from neighbours, which only the checkpoint corrects."""
    options = dict(max_steps=4, save_strategy="steps", save_steps=2)
    dataset = token_dataset(documents(16))
    model = get_peft_model(tiny_llama(), adapter_config())
    initialize_asymgqa_weights(model, prompt(16, 32).split(8), progress=False)
    expected = train_losses(build(model, dataset, tokenizer, tmp_path, **options))
    shutil.rmtree(tmp_path / "checkpoint-4")

    fresh = get_peft_model(tiny_llama(), adapter_config())
    searched = model.base_model.head_groups("default")
    assert fresh.base_model.head_groups("default") != searched
    trainer = build(fresh, dataset, tokenizer, tmp_path, **options)
    trainer.train(resume_from_checkpoint=True)
    assert logged_losses(trainer) == expected and len(expected) == 4
    assert fresh.base_model.head_groups("default") == searched
    assert fresh.peft_config["default"].head_groups == searched.to_lists()


# ---- Teacher ----


def test_teacher_has_no_dropout_and_student_keeps_it(tokenizer, tmp_path):
    model = get_peft_model(tiny_llama(attention_dropout=0.5), adapter_config(SINGLES))
    trainer = build(model, token_dataset(documents(4)), tokenizer, tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))

    def loss(weight):
        trainer.distillation_weight = weight
        torch.manual_seed(5)
        return trainer.compute_loss(model, dict(batch)).item()

    model.train()
    assert loss(1.0) > 1e-3  # the identity adapter differs from its teacher by dropout alone
    assert loss(1e-9) == pytest.approx(loss(0.0), rel=1e-5)  # a teacher with dropout would draw the student's masks
    assert all(module.training for module in model.modules())
    model.eval()
    assert loss(1.0) == 0.0


def test_base_model_mode_restores_everything():
    model = adapted().train()
    frozen = next(name for name, _ in model.named_parameters() if "lora_kv" in name)
    model.get_parameter(frozen).requires_grad_(False)
    model.base_model.model.model.layers[0].eval()
    ids = torch.tensor([documents(1)[0]])

    def flags():
        return {name: p.requires_grad for name, p in model.named_parameters()}

    def modes():
        return {name: module.training for name, module in model.named_modules()}

    flags_before, modes_before = flags(), modes()
    student = model(input_ids=ids).logits
    with base_model_mode(model):
        assert not any(module.training for module in model.modules() if not isinstance(module, torch.nn.Linear))
        assert not torch.is_grad_enabled()
        assert flags() == flags_before
        teacher = model(input_ids=ids).logits
    assert flags() == flags_before and modes() == modes_before
    assert torch.equal(teacher, tiny_llama()(input_ids=ids).logits)
    assert torch.equal(student, model(input_ids=ids).logits) and not torch.equal(student, teacher)
    with pytest.raises(RuntimeError, match="inside"), base_model_mode(model):
        raise RuntimeError("inside")
    assert torch.equal(student, model(input_ids=ids).logits)


def test_hooks_are_gone_after_a_step(tokenizer, tmp_path):
    model = adapted()
    trainer = build(model, token_dataset(documents(4)), tokenizer, tmp_path)
    first_loss(trainer)
    assert not model.get_output_embeddings()._forward_pre_hooks  # torch has no public list of hooks


# ---- Optimizer and precision ----


@pytest.mark.parametrize("scale", [0.5, 1.0, 0.0])
def test_shared_parameters_have_their_own_learning_rate(tokenizer, tmp_path, scale):
    model = adapted()
    trainer = build(
        model,
        token_dataset(documents(4)),
        tokenizer,
        tmp_path,
        trainer_options={"kv_learning_rate_scale": scale},
        learning_rate=1e-2,
        weight_decay=0.1,
    )
    groups = trainer.create_optimizer().param_groups
    decayed = set(trainer.get_decay_parameter_names(model))
    placed, count = {}, 0
    for group in groups:
        count += len(group["params"])
        for parameter in group["params"]:
            placed[id(parameter)] = group
    assert len(placed) == count  # no parameter twice
    shared_seen = 0
    for name, parameter in model.named_parameters():
        assert (id(parameter) in placed) == parameter.requires_grad
        if parameter.requires_grad:
            shared = SHARED.search(name) is not None
            shared_seen += shared
            assert placed[id(parameter)]["lr"] == pytest.approx(1e-2 * (scale if shared else 1))
            assert placed[id(parameter)]["weight_decay"] == (0.1 if name in decayed else 0.0)
    assert shared_seen >= 2 * LAYERS
    assert groups[0]["lr"] == 1e-2


def test_scheduler_keeps_the_ratio_and_logs_the_unscaled_rate(tokenizer, tmp_path):
    options = dict(lr_scheduler_type="linear", max_steps=4)
    trainer = build(adapted(), token_dataset(documents(16)), tokenizer, tmp_path, **options)
    ratios, rates = [], []
    optimizer = trainer.create_optimizer()
    step = optimizer.step

    def recorded(*args, **kwargs):
        rates.append(optimizer.param_groups[0]["lr"])
        ratios.append({group["lr"] / rates[-1] for group in optimizer.param_groups if group["params"]})
        return step(*args, **kwargs)

    optimizer.step = recorded
    logs = train(trainer)
    assert ratios == [{1.0, 0.5}] * 4
    assert [entry["learning_rate"] for entry in logs] == pytest.approx(rates)


def test_optimizer_that_is_passed_in_is_left_alone(tokenizer, tmp_path):
    model = adapted()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    extra = {"optimizers": (optimizer, None)}
    trainer = build(model, token_dataset(documents(4)), tokenizer, tmp_path, trainer_options=extra)
    assert len(trainer.create_optimizer().param_groups) == 1


def lora_dtypes(model):
    return {parameter.dtype for name, parameter in model.named_parameters() if "lora_A" in name}


def assert_float32_and_moved(model, before):
    """Nearly every number of the shared heads has moved: bf16 would swallow steps of this size."""
    for name, values in before.items():
        parameter = model.get_parameter(name)
        assert parameter.dtype == torch.float32
        assert (parameter != values).float().mean() > 0.9, name


def test_shared_parameters_stay_float32_on_a_quantised_base(tokenizer, tmp_path):
    model = adapted()
    model.is_loaded_in_4bit = True  # what makes SFTTrainer cast; the base itself need not be quantised for that
    exact = shared_parameters(model)
    for values in exact.values():
        assert not torch.equal(values, values.bfloat16().float())  # rounding would show
    trainer = build(model, token_dataset(documents(16)), tokenizer, tmp_path)
    assert lora_dtypes(model) == {torch.bfloat16}  # TRL did cast
    assert_equal(shared_parameters(model), exact)
    for name, parameter in trainer.model.named_parameters():
        assert parameter is model.get_parameter(name)


def test_four_bit_base_trains_float32_shared_parameters(tokenizer, tmp_path):
    pytest.importorskip("bitsandbytes")
    tiny_llama(hidden_size=192, head_dim=32).save_pretrained(tmp_path / "base")
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base", quantization_config=quantization, device_map="cpu")
    model = adapted(base)
    before = shared_parameters(model)
    logs = train(build(model, token_dataset(documents(16)), tokenizer, tmp_path, learning_rate=1e-4))
    for entry in logs:
        assert 0 < entry["distillation_loss"] < 10
    assert lora_dtypes(model) == {torch.bfloat16}
    assert_float32_and_moved(model, before)


def test_bfloat16_base_trains_float32_shared_parameters(tokenizer, tmp_path):
    model = adapted(tiny_llama().bfloat16())
    trainer = build(model, token_dataset(documents(16)), tokenizer, tmp_path, max_steps=4, learning_rate=1e-4)
    before = shared_parameters(model)
    logs = train(trainer)
    for entry in logs:
        assert 0 < entry["loss"] < 10
    assert_float32_and_moved(model, before)


def test_bf16_autocast_is_close_to_float32(tokenizer, tmp_path):
    losses = []
    for bf16 in (False, True):
        trainer = build(adapted(), token_dataset(documents(16)), tokenizer, tmp_path, bf16=bf16)
        losses.append(train_losses(trainer))
    assert losses[0] == pytest.approx(losses[1], rel=0.1)
    assert losses[0] != losses[1]


# ---- Logs and evaluation ----


def test_logs_are_means_over_tokens(tokenizer, tmp_path):
    docs, model = documents(8, shortest=3, longest=30), adapted()
    divergence, cross_entropy = reference(model, docs, 1.0), reference(model, docs, 0.0)
    trainer = build(
        model,
        token_dataset(docs),
        tokenizer,
        tmp_path,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        max_steps=4,
        logging_steps=4,
        learning_rate=1e-12,
    )
    (entry,) = train(trainer)
    assert entry["distillation_loss"] == pytest.approx(divergence, rel=1e-4)
    assert entry["sft_loss"] == pytest.approx(cross_entropy, rel=1e-4)
    assert entry["num_tokens"] == sum(map(len, docs))
    assert 0 <= entry["mean_token_accuracy"] <= 1 and entry["entropy"] > 0


@pytest.mark.parametrize("with_logits", [False, True])
@pytest.mark.filterwarnings("ignore:.*return_outputs.*:FutureWarning", "ignore:.*compute_metrics.*:FutureWarning")
def test_evaluation(tokenizer, tmp_path, with_logits):
    docs, model = documents(6), adapted()
    # Before the trainer: a deep copy of the model it patches would call the original.
    expected = reference(model, docs, 0.5, 2.0)
    divergence, cross_entropy = reference(model, docs, 1.0, 2.0), reference(model, docs, 0.0)
    extra = {"distillation_weight": 0.5, "temperature": 2.0, "eval_dataset": token_dataset(docs)}
    if with_logits:
        extra["compute_metrics"] = lambda prediction: {"width": prediction.predictions.shape[-1]}
    options = dict(per_device_eval_batch_size=6, eval_strategy="steps", eval_steps=1, max_steps=1, learning_rate=1e-12)
    trainer = build(model, token_dataset(docs), tokenizer, tmp_path, trainer_options=extra, **options)
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert metrics["eval_distillation_loss"] == pytest.approx(divergence, rel=1e-4)
    assert metrics["eval_sft_loss"] == pytest.approx(cross_entropy, rel=1e-5)
    assert metrics.get("eval_width", VOCAB) == VOCAB
    in_training = next(entry for entry in trainer.state.log_history if "eval_loss" in entry)
    assert in_training["eval_loss"] == pytest.approx(expected, rel=1e-5)


# ---- Arguments ----


@pytest.mark.parametrize(
    "name, value",
    [
        ("distillation_weight", 1.5),
        ("distillation_weight", "1"),
        ("temperature", 0.0),
        ("temperature", float("nan")),
        ("kv_learning_rate_scale", -1),
    ],
)
def test_bad_arguments_name_themselves(name, value):
    with pytest.raises(ValueError, match=rf"{name}={value!r}"):
        AsymGQATrainer(model=None, **{name: value})


def with_gpus(path, count) -> SFTConfig:
    """Arguments that see so many GPUs and no launcher."""
    args = SFTConfig(output_dir=str(path), use_cpu=True, bf16=False, report_to=[])
    assert args.n_gpu == 0  # sets it
    args._n_gpu = count
    return args


def test_several_gpus_without_a_launcher_are_refused_before_anything_changes(tokenizer, tmp_path):
    base = tiny_llama()
    modules = dict(base.named_modules())
    options = {"peft_config": adapter_config(), "train_dataset": token_dataset(documents())}
    options |= {"processing_class": tokenizer}
    with pytest.raises(ValueError, match="2 GPUs are visible to one process.*`accelerate launch`"):
        AsymGQATrainer(base, with_gpus(tmp_path, 2), **options)
    assert dict(base.named_modules()) == modules and not hasattr(base, "peft_config")
    # As after device_map="auto", which needs no launcher.
    base.hf_device_map = {"model.layers.0": 0, "model.layers.1": 1}
    trainer = AsymGQATrainer(base, with_gpus(tmp_path, 2), **options)
    assert trainer.args.n_gpu == 1


def test_model_without_adapter_is_refused(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="PeftModel"):
        build(tiny_llama(), token_dataset(documents(4)), tokenizer, tmp_path)


def test_an_adapter_without_shared_heads_is_refused(tokenizer, tmp_path):
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="needs an AsymGQA adapter.*of AsymGQAConfig, or distillation_weight=0"):
        build(model, token_dataset(documents(4)), tokenizer, tmp_path)


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_a_model_with_nothing_to_train_is_refused(tokenizer, tmp_path, weight):
    adapted().save_pretrained(tmp_path / "adapter")
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter")
    with pytest.raises(ValueError, match="has no parameter to train: load the adapter with is_trainable=True"):
        options = {"distillation_weight": weight}
        build(model, token_dataset(documents(4)), tokenizer, tmp_path, trainer_options=options)


@pytest.mark.parametrize("option", [{"loss_type": "dft"}, {"label_smoothing_factor": 0.1}])
@pytest.mark.filterwarnings("ignore:.*label_smoothing_factor.*:FutureWarning")
def test_undefined_options_are_refused(tokenizer, tmp_path, option):
    with pytest.raises(ValueError, match=next(iter(option))):
        build(adapted(), token_dataset(documents(4)), tokenizer, tmp_path, **option)


def test_peft_config_is_accepted(tokenizer, tmp_path):
    extra = {"peft_config": adapter_config(GROUPS["llama"])}
    logs = train(build(tiny_llama(), token_dataset(documents(16)), tokenizer, tmp_path, trainer_options=extra))
    assert all(entry["loss"] > 0 for entry in logs)


def test_torch_compile_compiles_one_graph_for_all_layers_while_training(tmp_path, tokenizer):
    data = token_dataset(documents(shortest=20, longest=21))
    options = dict(gradient_checkpointing=True, torch_compile_backend="aot_eager")
    expected = build(adapted(), data, tokenizer, tmp_path / "eager", gradient_checkpointing=True)
    found = build(adapted(), data, tokenizer, tmp_path / "compiled", **options)
    layers = found.model.base_model.decoder_layers
    seen = []

    class Watch(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            compiled = [layer._compiled_call_impl is not None for layer in layers]
            seen.append((compiled, torch._dynamo.config.optimize_ddp))

    found.add_callback(Watch())
    torch._dynamo.reset()
    counters.clear()
    assert train_losses(found) == pytest.approx(train_losses(expected), rel=1e-5)
    assert seen == [([True] * LAYERS, False)] * 3  # a layer is small enough for DDP as it is
    # The student's, the teacher's, and the first layer's, whose input needs a gradient: groups make none of their own.
    assert 0 < counters["stats"]["unique_graphs"] <= 3 and not counters["graph_break"]
    assert not any(layer._compiled_call_impl for layer in layers)
    for name, value in parameters(found.model).items():
        torch.testing.assert_close(value, dict(expected.model.named_parameters())[name], rtol=1e-3, atol=1e-5)
