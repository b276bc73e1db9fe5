"""No mutated adapter folder does more than plain LoRA's does, nor loads where LoRA's is refused; see hostile.py."""

from __future__ import annotations

import os
import pickle
import time

import hostile
import pytest
from hostile import LORA, OURS, Case, Loader, Planted, Result, all_cases, faults, load_all, run, set_field, write_valid
from peft import PeftModel


@pytest.mark.slow
def test_hostile_folders():
    cases, ours, lora = run(os.environ.get("HOSTILE_SEED", "0"))
    assert len(ours) == len(cases) >= 1500 and len(lora) >= 1000
    outcomes = [result.outcome for result in ours.values()]
    assert outcomes.count("refused") > 900 and outcomes.count("loaded") > 300  # neither all nor none
    assert any(result.is_silent_and_wrong for result in lora.values())
    found = faults(cases, ours, lora)
    assert not found, found


def test_what_must_not_be_is_found(tmp_path, monkeypatch):
    """A load that unpickles, writes elsewhere, starts something, hangs, dies, or answers otherwise without a word."""
    write_valid(tmp_path)
    loader = Loader(tmp_path)
    load = PeftModel.from_pretrained

    def loaded(model, folder):
        told = hostile.json.loads((folder / hostile.CONFIG).read_text())["base_model_name_or_path"]
        if told == "unpickles":
            pickle.loads(pickle.dumps({"x": Planted()}))
        elif told == "writes":
            (tmp_path / "elsewhere").write_text("")
        elif told == "starts":
            os.system("true")
        elif told == "hangs":
            time.sleep(60)
        elif told == "dies":
            os._exit(1)
        elif told == "raises":
            raise AttributeError("no message for a user")
        elif told == "changes":
            model.model.embed_tokens.weight.data += 1
        return load(model, folder)

    monkeypatch.setattr(PeftModel, "from_pretrained", loaded)
    monkeypatch.setattr(hostile, "SECONDS", 1.0)
    expected = {
        "unpickles": "unpickles io.open",
        "writes": f"open {tmp_path / 'elsewhere'}",
        "starts": "os.system",
        "hangs": "hang",
        "dies": "crash",
        "raises": "refused by AttributeError: no message for a user",
        "changes": "loads silently and answers differently",
    }
    cases = [Case(name, set_field("base_model_name_or_path", name), own=True) for name in ("fine", *expected)]
    found = faults(cases, load_all(loader, tmp_path, OURS, cases, "0"), {})
    assert found == expected


def test_plain_lora_may_fail_alike():
    cases = [Case("x", set_field("r", 1))]
    hang, wrong, refused = Result("hang"), Result("loaded", same=False), Result("refused", "KeyError")
    assert not faults(cases, {"x": hang}, {"x": hang}) and not faults(cases, {"x": wrong}, {"x": wrong})
    assert not faults(cases, {"x": refused}, {"x": Result("loaded")})
    for ours, lora in ((hang, refused), (wrong, refused), (wrong, Result("loaded", told=["a warning"], same=False))):
        assert faults(cases, {"x": ours}, {"x": lora})


def test_cases_are_many_and_have_names_of_their_own(tmp_path):
    write_valid(tmp_path)
    cases = all_cases(tmp_path)
    assert len({case.name for case in cases}) == len(cases) >= 1500
    assert (tmp_path / LORA / hostile.WEIGHTS).exists()
