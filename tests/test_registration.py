"""Registration with PEFT: the enum member behaves as one of its own, and importing does nothing else."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys

import peft
import pytest
from peft import PeftType, get_peft_config
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

import asymgqa_peft
from asymgqa_peft import AsymGQAConfig, AsymGQAModel
from asymgqa_peft.adapter.model import register


def test_member_is_indistinguishable_from_pefts_own():
    """Canary: a PEFT or Python that builds its enum differently fails here first, and says where."""
    member = PeftType.ASYM_GQA
    assert type(member) is PeftType and isinstance(member, str)
    assert PeftType("ASYM_GQA") is member and PeftType["ASYM_GQA"] is member
    assert (member.name, member.value, str.__str__(member)) == ("ASYM_GQA", "ASYM_GQA", "ASYM_GQA")
    assert repr(member) == repr(PeftType.LORA).replace("LORA", "ASYM_GQA")
    assert f"{member}" == f"{PeftType.LORA}".replace("LORA", "ASYM_GQA")
    assert list(PeftType).count(member) == 1 and member in PeftType and "ASYM_GQA" in PeftType.__members__
    assert len(list(PeftType)) == len(PeftType.__members__)
    assert member == "ASYM_GQA" and member != PeftType.LORA and len({member, PeftType.LORA, "ASYM_GQA"}) == 2
    assert json.loads(json.dumps({"type": member})) == {"type": "ASYM_GQA"}
    assert pickle.loads(pickle.dumps(member)) is member


def test_peft_knows_config_tuner_and_prefix():
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.ASYM_GQA] is AsymGQAConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.ASYM_GQA] is AsymGQAModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.ASYM_GQA] == "lora_"  # PEFT 0.20 finds tensors to train by it
    config = get_peft_config({"peft_type": "ASYM_GQA", "num_key_value_heads": 2})
    assert type(config) is AsymGQAConfig and config.peft_type is PeftType.ASYM_GQA


def test_other_methods_keep_their_registration():
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA] is peft.LoraModel
    assert peft.LoraConfig().peft_type is PeftType.LORA
    assert set(PEFT_TYPE_TO_CONFIG_MAPPING) <= set(PeftType)


def test_registering_twice_changes_nothing():
    before = (list(PeftType), dict(PEFT_TYPE_TO_TUNER_MAPPING), PeftType.ASYM_GQA)
    register()
    assert (list(PeftType), dict(PEFT_TYPE_TO_TUNER_MAPPING), PeftType.ASYM_GQA) == before


IMPORT_PROBE = """
import json, logging, os, pathlib, random, sys, tempfile, time, warnings
import numpy, torch
start = time.perf_counter()
import peft
peft_seconds = time.perf_counter() - start
state = lambda: (
    torch.get_default_dtype(), torch.is_grad_enabled(), torch.random.get_rng_state().tolist(), random.getstate(),
    dict(os.environ), list(warnings.filters), list(logging.root.handlers), logging.root.level,
)
folder = pathlib.Path(tempfile.mkdtemp())
(folder / "adapter_config.json").write_text('{"peft_type": "ASYM_GQA", "num_key_value_heads": 2}')
def load():
    try:
        return type(peft.PeftConfig.from_pretrained(folder)).__name__
    except KeyError as error:
        return repr(error)
unknown = load()
before = set(sys.modules)
settings = state()
types = list(peft.PeftType)
start = time.perf_counter()
import asymgqa_peft
seconds = time.perf_counter() - start
new = sorted({name.partition(".")[0] for name in set(sys.modules) - before})
print(json.dumps({
    "peft_seconds": peft_seconds, "seconds": seconds, "new": new, "settings": state() == settings,
    "unknown": unknown, "known": load(), "types": [t for t in peft.PeftType if t not in types],
}))
"""


def test_importing_registers_and_does_nothing_else():
    """In a fresh interpreter. Without the import PEFT does not know the type: why the model card must show it."""
    done = subprocess.run([sys.executable, "-c", IMPORT_PROBE], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    probe = json.loads(done.stdout.splitlines()[-1])
    assert probe["unknown"] == "KeyError('ASYM_GQA')" and probe["known"] == "AsymGQAConfig"
    print(f"import peft {probe['peft_seconds']:.2f} s, asymgqa_peft beyond it {probe['seconds']:.2f} s")
    assert probe["types"] == ["ASYM_GQA"]
    assert probe["settings"]
    assert "asymgqa_peft" in probe["new"]  # the probe looks at a fresh import
    assert not {"trl", "datasets", "matplotlib", "bitsandbytes", "pandas"} & set(probe["new"])


def test_lazy_names_resolve_and_unknown_ones_do_not():
    for name in asymgqa_peft.__all__:
        assert getattr(asymgqa_peft, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'AsymGQATuner'"):
        asymgqa_peft.AsymGQATuner  # noqa: B018
