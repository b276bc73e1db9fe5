#!/usr/bin/env bash
# TRL's own tests of SFTTrainer, of the installed version, run on AsymGQATrainer:
#   bash tests/trl_suite.sh [pytest arguments]
#   TRL_CHECKOUT=/path/to/trl bash tests/trl_suite.sh    takes them from there: TRL's releases on PyPI have no tests
# Every test runs three times: as it is, which shows what this machine can run; and with AsymGQATrainer at
# distillation_weight 0 and 1, on an AsymGQA adapter (tests/trl_suite/shim.py, which also lists what cannot pass, each
# with its reason). The hub's models are tiny random ones of the same architectures under the same names, its data sets
# what TRL's scripts make (tests/trl_suite/prepare.py). All files go to out/trl_suite.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source recipes/environment.sh
make_environment test
python=$(cd "$(dirname "$PYTHON")" && pwd)/python root=$PWD out=out/trl_suite
version=$("$python" -c 'from importlib.metadata import version; print(version("trl"))')
checkout=${TRL_CHECKOUT:-$out/trl-$version}
if [[ ! -e $checkout ]]; then
    mkdir -p "$out"
    git -c advice.detachedHead=false clone --quiet --depth 1 --branch "v$version" \
        https://github.com/huggingface/trl "$checkout" || fail "TRL $version could not be fetched: name a checkout," \
        "TRL_CHECKOUT=/path/to/trl."
fi
suite=$out/suite
rm -rf "$suite"
mkdir -p "$suite"
# Not its package, which would come before the installed one.
cp -R "$checkout/tests" "$checkout/scripts" "$suite"
# A cache of its own: data sets of the same names may be in the user's.
export HF_HUB_OFFLINE=1 HF_DATASETS_CACHE=$root/$suite/cache PYTHONPATH=$root:$root/tests/trl_suite
"$python" tests/trl_suite/prepare.py "$suite"
echo "$0: tests of TRL $(<"$checkout/VERSION") on TRL $version"
cd "$suite"
# Without this project's configuration of pytest.
exec "$python" -m pytest -p shim -c /dev/null --rootdir . \
    tests/test_sft_trainer.py -k "TestSFTTrainer and not Slow" "$@"
