#!/usr/bin/env bash
# PEFT's own tests of configurations and decoder models, from the source release of the installed version, run on
# AsymGQAConfig:
#   bash tests/peft_suite.sh [pytest arguments]
# The hub's models are tiny random ones of the same architectures under the same names (tests/peft_suite/prepare.py).
# The few tests that cannot pass stand in tests/peft_suite/shim.py, each with its reason. All files go to out/peft_suite.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source recipes/environment.sh
make_environment test
python=$(cd "$(dirname "$PYTHON")" && pwd)/python root=$PWD out=out/peft_suite
version=$("$python" -c 'from importlib.metadata import version; print(version("peft"))')
suite=$out/peft-$version
if [[ ! -e $suite/prepared ]]; then
    rm -rf "$suite"
    mkdir -p "$out"
    "$python" -m pip download --quiet --no-deps --no-binary peft --dest "$out" "peft==$version"
    tar --extract --gzip --file "$out/peft-$version.tar.gz" --directory "$out"
    "$python" tests/peft_suite/prepare.py "$suite"
    touch "$suite/prepared"
fi
cd "$suite"
export HF_HUB_OFFLINE=1 PYTHONPATH=$root:$root/tests/peft_suite
# PEFT's own settings make errors of what transformers deprecates after its release.
exec "$python" -m pytest -p shim --override-ini addopts= --override-ini filterwarnings=default \
    tests/test_config.py tests/test_decoder_models.py -k "AsymGQAConfig and not GPT" "$@"
