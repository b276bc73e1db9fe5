"""Saving and pushing adapters and merged models with their card: one commit, private unless asked otherwise.

`PeftModel.push_to_hub` and `PreTrainedModel.push_to_hub` overwrite a folder's README.md with the repository's, or with
an empty one. The functions here upload the folder as it is; later pushes by those methods then keep the card.
"""

from __future__ import annotations

import fnmatch
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import RepositoryNotFoundError
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .card import TRANSPORT_ERRORS, Conversion, base_licence, check_repo_id, model_card, package_version
from .files import folder_beside

PICKLED = frozenset({".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth"})
"""File types that run code when they are loaded, and are not pushed."""

# What an earlier push may have left, and a loader would find beside or instead of the new files.
_SUPERSEDED = (
    "config.json",
    "adapter_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "adapter_model.safetensors",
    "pytorch_model*.bin",
    "pytorch_model.bin.index.json",
    "adapter_model.bin",
)


def push_adapter_to_hub(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase | None,
    repo_id: str,
    *,
    private: bool = True,
    exist_ok: bool = False,
    token: str | None = None,
    base_model: str | None = None,
    **card: object,
) -> str:
    """Push the active adapter, with its card, in one commit.

    Args:
        model: the wrapped model.
        tokenizer: pushed along, if given.
        repo_id: "owner/name" of the repository, made if it does not exist.
        private: whether a new repository is private; an existing public one is then refused.
        exist_ok: whether to replace what an existing repository holds.
        token: of the Hub; default is the one logged in with.
        base_model: "owner/name" of the base, needed if the model was not loaded from the Hub.
        **card: `report`, `evaluation`, `calibration_data`, `recovery_data`, see `model_card`.

    Returns:
        URL of the repository.

    Raises:
        ValueError: for a model without AsymGQA adapter, a base that others cannot load, a bad or taken repository
            id, or a missing or refused token; nothing was pushed then.
        ConnectionError: if the Hub could not be reached or the push was interrupted; the repository then shows all
            of the push or nothing.
    """
    check_push_target(repo_id, private=private, exist_ok=exist_ok, token=token)
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(model, tokenizer, folder, name=repo_id, base_model=base_model, token=token, **card)
        return push_folder(folder, repo_id, private=private, exist_ok=exist_ok, token=token)


def push_merged_to_hub(
    plain: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    repo_id: str,
    *,
    conversion: Conversion,
    private: bool = True,
    exist_ok: bool = False,
    token: str | None = None,
    max_shard_size: int | str = "5GB",
    **card: object,
) -> str:
    """Push a merged model, with its card, in one commit.

        conversion = Conversion.of(model)  # merging loses these facts
        plain = model.merge_and_unload()
        push_merged_to_hub(plain, tokenizer, "me/model-gqa", conversion=conversion)

    Args and errors: see `push_adapter_to_hub`. Needs free space for the model in the temporary folder ($TMPDIR).
    """
    check_push_target(repo_id, private=private, exist_ok=exist_ok, token=token)
    with tempfile.TemporaryDirectory() as folder:
        save_merged(
            plain, tokenizer, folder, conversion, name=repo_id, token=token, max_shard_size=max_shard_size, **card
        )
        return push_folder(folder, repo_id, private=private, exist_ok=exist_ok, token=token)


def save_adapter(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path | str,
    *,
    name: str | None = None,
    base_model: str | None = None,
    token: str | None = None,
    **card: object,
) -> None:
    """Save the active adapter with its card, ready to be pushed; `folder` is written whole or not at all.

    Raises:
        ValueError: for a model without AsymGQA adapter, a base that has no name on the Hub, or a folder that holds
            something.
    """
    folder = _checked_empty(folder)
    conversion = Conversion.of(model, base_model)
    base_model = published_base(conversion)
    licence = base_licence(base_model, conversion.base_revision, token)
    text = model_card(conversion, name=name or folder.name, licence=licence, **card)
    adapter_name = model.active_adapter
    with folder_beside(folder) as beside:
        model.save_pretrained(str(beside), selected_adapters=[adapter_name])
        if adapter_name != "default":  # PEFT puts it into a folder of its own, where no loader looks on the Hub
            for file in (beside / adapter_name).iterdir():
                file.replace(beside / file.name)
            (beside / adapter_name).rmdir()
        name_base(beside / "adapter_config.json", base_model)
        if tokenizer is not None:
            _save_tokenizer(tokenizer, beside)
        write_card(beside, text)


def save_merged(
    plain: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path | str,
    conversion: Conversion,
    *,
    name: str | None = None,
    token: str | None = None,
    max_shard_size: int | str = "5GB",
    **card: object,
) -> None:
    """Save a merged model with its tokenizer, generation configuration, chat template and card.

    Weights go to disk file by file, without a copy of the model; `folder` is written whole or not at all.

    Raises:
        ValueError: for a model that still has an adapter, or a folder that holds something.
    """
    if isinstance(plain, PeftModel) or not isinstance(plain, PreTrainedModel):
        raise ValueError(
            f"{type(plain).__name__} is not a merged model: take Conversion.of(model), then pass what "
            "model.merge_and_unload() returns."
        )
    folder = _checked_empty(folder)
    licence = base_licence(conversion.base_source, conversion.base_revision, token)
    text = model_card(conversion, plain.config, name=name or folder.name, licence=licence, **card)
    with folder_beside(folder) as beside:
        plain.save_pretrained(str(beside), max_shard_size=max_shard_size)
        if tokenizer is not None:
            _save_tokenizer(tokenizer, beside)
        write_card(beside, text)


def _save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save a tokenizer under a class name that transformers 4 knows too, which converters of engines still pin.

    transformers 5 calls the class of a bare tokenizer.json TokenizersBackend, and loads the older name as the same.
    """
    tokenizer.save_pretrained(str(folder))
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def check_push_target(repo_id: str, *, private: bool = True, exist_ok: bool = False, token: str | None = None) -> None:
    """Find out before any work whether a push can succeed; arguments and errors as for `push_adapter_to_hub`."""
    _replaced_files(_api(token), repo_id, private, exist_ok)


def push_folder(
    folder: Path | str, repo_id: str, *, private: bool = True, exist_ok: bool = False, token: str | None = None
) -> str:
    """Upload a saved model in one commit, which also removes what would shadow it; returns the repository's URL.

    Arguments and errors: as for `push_adapter_to_hub`; also ValueError for a folder with pickled weights or
    without any, and for an adapter whose base is not on the Hub.
    """
    files, api = _files(Path(folder)), _api(token)
    existing = _replaced_files(api, repo_id, private, exist_ok)
    if "adapter_config.json" in files:
        _check_base(api, files["adapter_config.json"])
    operations = [CommitOperationAdd(name, str(path)) for name, path in files.items()]
    operations += [CommitOperationDelete(name) for name in existing if _is_superseded(name) and name not in files]
    with _clear_errors(repo_id):
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        # Not upload_folder: huggingface_hub 2 spreads large folders over several commits.
        api.create_commit(repo_id, operations, commit_message=f"Upload with asymgqa_peft {package_version()}")
    return str(url)


def published_base(conversion: Conversion) -> str:
    """The base's repository on the Hub, without which nobody else can load an adapter.

    Raises:
        ValueError: if there is none.
    """
    if conversion.base_model is None:
        raise ValueError(
            f"The adapter's base is {conversion.base_source!r}, which is not a repository on the "
            "Hub: nobody else could load the adapter. Pass base_model='owner/name', or push the merged model."
        )
    return conversion.base_model


def name_base(config_file: Path, base_model: str) -> None:
    """Write the base's repository into a saved `adapter_config.json`."""
    config = json.loads(config_file.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = base_model
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def write_card(folder: Path | str, text: str) -> None:
    """Write README.md, over whatever a save_pretrained left there."""
    Path(folder, "README.md").write_text(text, encoding="utf-8")


def _checked_empty(folder: Path | str) -> Path:
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"folder={str(folder)!r} holds something already: remove it or choose another folder.")
    return folder


def _api(token: str | None) -> HfApi:
    token = token or get_token()
    if not token:
        raise ValueError(
            "No token for the Hub: run `hf auth login`, set HF_TOKEN, or pass token= (one with write access)."
        )
    return HfApi(token=token)


def _replaced_files(api: HfApi, repo_id: str, private: bool, exist_ok: bool) -> list[str]:
    """Files that the repository holds already. What an interrupted first push left, an empty one, counts as new."""
    check_repo_id(repo_id)
    with _clear_errors(repo_id):
        try:
            info = api.model_info(repo_id)
        except RepositoryNotFoundError:
            return []
    files = [sibling.rfilename for sibling in info.siblings or []]
    if private and not info.private:
        raise ValueError(
            f"repo_id={repo_id!r} exists and is public: pass private=False to push to it, or make it private first."
        )
    if not exist_ok and set(files) - {".gitattributes"}:
        raise ValueError(f"repo_id={repo_id!r} exists and has files: pass exist_ok=True to replace them.")
    return files


def _check_base(api: HfApi, config_file: Path) -> None:
    base = json.loads(config_file.read_text(encoding="utf-8")).get("base_model_name_or_path")
    with _clear_errors(str(base)):
        known = bool(base) and api.repo_exists(base)
    if not known:
        raise ValueError(
            f"The adapter's base {base!r} is not on the Hub, or not for this token: nobody could load the adapter. "
            "Pass base_model='owner/name', or push the merged model."
        )


@contextmanager
def _clear_errors(repo_id: str) -> Iterator[None]:
    try:
        yield
    except TRANSPORT_ERRORS as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403, 404):
            raise ValueError(
                f"The Hub refused the token for repo_id={repo_id!r} ({status}): use one that may write there."
            ) from error
        raise ConnectionError(
            f"The push to {repo_id} did not complete: {error}\nAll files go in one commit, so nothing of it is "
            "visible unless all is. Push again; should that find the repository filled, it had arrived."
        ) from error


def _is_superseded(name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in _SUPERSEDED)


def _files(folder: Path) -> dict[str, Path]:
    """Everything to upload, by its name in the repository; hidden files stay."""
    if not folder.is_dir():
        raise ValueError(f"folder={str(folder)!r} is not a folder.")
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    files = {name: path for name, path in paths.items() if not any(part.startswith(".") for part in name.split("/"))}
    if pickled := [name for name in files if Path(name).suffix in PICKLED]:
        raise ValueError(f"{', '.join(pickled)} would run code when loaded: save as safetensors, remove them.")
    if not any(name.endswith(".safetensors") for name in files):
        raise ValueError(f"folder={str(folder)!r} holds no safetensors weights: save a model there first.")
    return files
