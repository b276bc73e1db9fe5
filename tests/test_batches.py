"""One check of batches for everything that reads them."""

import pytest
import torch
from transformers import BatchEncoding

from asymgqa_peft.batches import checked_batches

IDS = torch.arange(12).view(3, 4)


def test_every_form_of_a_batch_becomes_a_dict_of_what_was_given():
    mask = torch.ones_like(IDS)
    given = [IDS, {"input_ids": IDS, "labels": None}, BatchEncoding({"input_ids": IDS, "attention_mask": mask})]
    beside = {"attention_mask": mask, "position_ids": IDS, "labels": IDS}
    given.append({"input_ids": IDS, **beside, "token_type_ids": IDS, "inputs_embeds": None})
    names = [set(batch) for batch in checked_batches(iter(given))]
    full = {"input_ids", *beside}
    assert names == [{"input_ids"}, {"input_ids"}, {"input_ids", "attention_mask"}, full]


@pytest.mark.parametrize("name", ["attention_mask", "position_ids", "labels"])
@pytest.mark.parametrize(
    ("tensor", "seen"),
    [(torch.ones(3, 5), r"float32 of shape \(3, 5\)"), ([[1] * 4] * 3, "list"), (IDS[0], r"\(4,\)")],
)
def test_what_goes_with_the_tokens_has_their_shape(name, tensor, seen):
    with pytest.raises(ValueError, match=rf"batches\[1\]: {name} must have input_ids' shape \(3, 4\), got .*{seen}: "):
        checked_batches([IDS, {"input_ids": IDS, name: tensor}])


@pytest.mark.parametrize("name", ["inputs_embeds", "cu_seq_lens_q", "past_key_values", "text"])
def test_what_would_not_be_read_is_refused_by_name(name):
    with pytest.raises(ValueError, match=rf"batches\[1\] holds {name!r}, which is not read: only input_ids"):
        checked_batches([IDS, {"input_ids": IDS, name: IDS}])


@pytest.mark.parametrize("ids", [IDS[0], IDS.float(), IDS[:0], IDS[None], None, "text"])
def test_what_holds_no_tokens_is_refused_with_its_index(ids):
    with pytest.raises(ValueError, match=r"batches\[2\]: input_ids must be integers of shape \(B, T\), got .*pass"):
        checked_batches([IDS, IDS, {"input_ids": ids}])


@pytest.mark.parametrize("batches", [IDS, {"input_ids": IDS}, 3])
def test_one_batch_alone_is_no_list_of_batches(batches):
    with pytest.raises(ValueError, match=f"batches is a {type(batches).__name__}: pass an iterable"):
        checked_batches(batches)
