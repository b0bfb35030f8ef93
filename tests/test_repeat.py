import dataclasses
from collections import namedtuple
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import default_collate
from transformers import BatchEncoding, DataCollatorForLanguageModeling, DataCollatorForSeq2Seq
from transformers.modeling_outputs import Seq2SeqLMOutput

from seqba import BatchAugmentationCollator, copy_ids, fold, repeat_batch, unfold
from seqba.repeat import largest_tensor
from word_tokenizer import word_tokenizer


@dataclasses.dataclass(frozen=True)
class Pair:
    input_ids: torch.Tensor
    name: str


Streams = namedtuple("Streams", "hidden cell")


@pytest.mark.parametrize("num_copies", [1, 2, 5])
def test_row_m_times_b_plus_n_is_copy_m_of_sample_n(num_copies):
    x = torch.randn(3, 4)
    rows = repeat_batch({"input_ids": x}, num_copies)["input_ids"]
    for m in range(num_copies):
        for n in range(3):
            assert torch.equal(rows[m * 3 + n], x[n])


@pytest.mark.trap(4)
def test_a_time_major_batch_becomes_wider_not_longer():
    streams = torch.arange(7 * 3).view(7, 3)  # (T, B)
    batch = {"input_ids": streams, "lengths": torch.tensor([7, 6, 5])}
    repeated = repeat_batch(batch, 4, dim=1)
    assert repeated["input_ids"].shape == (7, 4 * 3)
    assert torch.equal(repeated["input_ids"][:, 3:6], streams)
    assert repeated["lengths"].tolist() == [7, 6, 5] * 4


@pytest.mark.trap(18)
def test_fold_undoes_unfold_and_the_copy_axis_is_in_front():
    x = torch.randn(4 * 3, 5)
    assert unfold(x, 4).shape == (4, 3, 5)
    assert torch.equal(fold(unfold(x, 4)), x)
    assert torch.equal(unfold(repeat_batch(x[:3], 4), 4)[2], x[:3])
    assert torch.equal(copy_ids(4, 3), unfold(copy_ids(4, 3), 4).flatten())
    assert (unfold(copy_ids(4, 3), 4) == torch.arange(4)[:, None]).all()


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_fold_undoes_unfold_along_any_axis(dim):
    x = torch.randn(6, 6, 6)
    assert unfold(x, 3, dim=dim).shape[0] == 3
    assert torch.equal(fold(unfold(x, 3, dim=dim), dim=dim), x)


@pytest.mark.trap(19)
@pytest.mark.parametrize("num_copies", [1, 3])
def test_repeated_tensors_are_contiguous_so_that_in_place_dropout_may_write(num_copies):
    batch = {"input_ids": torch.ones(1, 4).expand(2, 4), "mask": torch.ones(4, 2).t()}
    repeated = repeat_batch(batch, num_copies)
    assert all(x.is_contiguous() for x in repeated.values())
    torch.nn.functional.dropout(repeated["input_ids"], 0.5, inplace=True)
    assert torch.equal(batch["input_ids"], torch.ones(2, 4))


def test_nested_structures_keep_their_types_and_scalars_are_untouched():
    x = torch.arange(6).view(2, 3)
    batch: dict[str, Any] = {
        "input_ids": x,
        "nested": {"deep": (x + 1, [x + 2])},
        "state": Streams(x + 3, x + 4),
        "pair": Pair(x, "kept"),
        "scale": torch.tensor(2.0),
        "text": ["one", "two"],
        "flag": True,
        "none": None,
    }
    out = repeat_batch(batch, 3)
    assert out["nested"]["deep"][1][0].tolist() == (x + 2).tolist() * 3
    assert isinstance(out["nested"]["deep"], tuple)
    assert isinstance(out["state"], Streams)
    assert out["state"].cell.shape == (6, 3)
    assert out["pair"].input_ids.shape == (6, 3)
    assert out["pair"].name == "kept"
    assert out["scale"].shape == ()
    assert out["text"] == ["one", "two"] * 3
    assert out["flag"] is True
    assert out["none"] is None
    assert batch["input_ids"].shape == (2, 3)
    assert batch["pair"].input_ids.shape == (2, 3)


def test_batch_encoding_and_model_output_come_back_as_themselves():
    encoding = BatchEncoding({"input_ids": torch.ones(2, 3), "attention_mask": torch.ones(2, 3)})
    repeated = repeat_batch(encoding, 2)
    assert isinstance(repeated, BatchEncoding)
    assert repeated.input_ids.shape == (4, 3)
    assert encoding.input_ids.shape == (2, 3)
    output = repeat_batch(Seq2SeqLMOutput(loss=torch.tensor(1.0), logits=torch.ones(2, 3, 5)), 2)
    assert isinstance(output, Seq2SeqLMOutput)
    assert output.logits.shape == output["logits"].shape == (4, 3, 5)
    assert output.loss.shape == ()


def test_lists_of_one_item_a_sample_are_repeated_whatever_the_items_are():
    boxes = [torch.zeros(1, 4), torch.zeros(5, 4), torch.zeros(2, 4)]  # as many as each sample has
    batch: dict[str, Any] = {"input_ids": torch.ones(3, 2), "boxes": boxes, "meta": [{"id": 1}, {"id": 2}, {"id": 3}]}
    out = repeat_batch(batch, 2)
    assert [len(x) for x in out["boxes"]] == [1, 5, 2, 1, 5, 2]
    assert [x["id"] for x in out["meta"]] == [1, 2, 3, 1, 2, 3]


def test_a_plain_tensor_and_a_tuple_of_images_and_targets_need_no_names():
    images, targets = repeat_batch((torch.zeros(2, 3, 4, 4), torch.tensor([1, 0])), 3)
    assert images.shape == (6, 3, 4, 4)
    assert targets.tolist() == [1, 0] * 3
    assert repeat_batch(torch.arange(2), 2).tolist() == [0, 1, 0, 1]


@pytest.mark.trap(35)
def test_a_tensor_of_another_leading_size_is_refused_and_named():
    with pytest.raises(ValueError, match=r"batch\.cu_seq_lens has shape \(5,\).*holds 2 samples"):
        repeat_batch({"input_ids": torch.ones(2, 3), "cu_seq_lens": torch.ones(5)}, 2)
    with pytest.raises(ValueError, match=r"batch\.inner\.mask has shape"):
        repeat_batch({"inner": {"mask": torch.ones(3, 3)}, "labels": torch.ones(2)}, 2)
    with pytest.raises(ValueError, match="list of 3 items, but the batch holds 2"):
        repeat_batch({"input_ids": torch.ones(2, 3), "names": ["a", "b", "c"]}, 2)
    with pytest.raises(ValueError, match="pass num_samples"):
        repeat_batch({"pixels": torch.ones(2, 3), "boxes": torch.ones(7, 3)}, 2)
    assert repeat_batch({"pixels": torch.ones(2, 3)}, 2, num_samples=2)["pixels"].shape == (4, 3)


@pytest.mark.parametrize("num_copies", [0, -1, 1.5, True])
def test_a_number_of_copies_below_one_is_refused(num_copies):
    with pytest.raises(ValueError, match="num_copies must be an integer of at least 1, got"):
        repeat_batch({"input_ids": torch.ones(2, 3)}, num_copies)


def test_tensors_whose_rows_cannot_be_repeated_are_refused_by_name():
    packed = torch.nn.utils.rnn.pack_sequence([torch.ones(3), torch.ones(2)])
    with pytest.raises(TypeError, match=r"batch\.x is a PackedSequence"):
        repeat_batch({"labels": torch.ones(2), "x": packed}, 2)
    with pytest.raises(TypeError, match=r"batch\.x is a nested or sparse"):
        repeat_batch({"labels": torch.ones(2), "x": torch.eye(2).to_sparse()}, 2)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors_are_refused_by_name(layout):
    nested = torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(4, 3)], layout=layout)
    with pytest.raises(TypeError, match=r"batch\.x is a nested or sparse"):
        repeat_batch({"x": nested}, 2)
    assert largest_tensor({"x": nested, "y": torch.ones(2, 5)}) == (18, 5)


def test_unfold_refuses_a_size_that_is_no_multiple():
    with pytest.raises(ValueError, match=r"shape \(7, 2\) into num_copies=3 along dim 0: the size 7"):
        unfold(torch.ones(7, 2), 3)
    with pytest.raises(ValueError, match="copy axis"):
        fold(torch.ones(4))


def plain(samples):
    return torch.tensor(samples), len(samples)


def test_the_collator_wraps_a_default_and_a_plain_collator():
    batch = BatchAugmentationCollator(default_collate, 3)([{"x": 1, "labels": 4}, {"x": 2, "labels": 5}])
    assert batch["x"].tolist() == [1, 2] * 3
    x, length = BatchAugmentationCollator(plain, 2)([7, 8, 9])
    assert x.tolist() == [7, 8, 9, 7, 8, 9]
    assert length == 3
    with pytest.raises(ValueError, match="num_copies must be at least 1, got 0"):
        BatchAugmentationCollator(plain, 0)


class FewTokens:
    """As much of a tokenizer as transformers' collators ask for."""

    pad_token_id, mask_token_id, mask_token, pad_token = 0, 1, "<mask>", "<pad>"
    padding_side, is_fast = "right", False

    def __len__(self):
        return 20

    def pad(self, features, return_tensors=None, **_):
        width = max(len(f["input_ids"]) for f in features)
        columns = {key: [f[key] for f in features] for key in features[0] if key != "labels"}
        if "labels" in features[0]:
            columns["labels"] = [f["labels"] for f in features]
        fill = {"labels": -100}
        rows = {
            key: torch.tensor([list(v) + [fill.get(key, 0)] * (max(map(len, values)) - len(v)) for v in values])
            for key, values in columns.items()
        }
        assert width
        return BatchEncoding(rows)

    def get_special_tokens_mask(self, ids, already_has_special_tokens=True):
        return [0] * len(ids)

    def convert_tokens_to_ids(self, token):
        return 1


class WithDecoderInputs:
    def prepare_decoder_input_ids_from_labels(self, labels):
        return labels.clamp(min=0).roll(1, dims=1)


@pytest.mark.trap(35)
def test_seq2seq_decoder_inputs_exist_and_are_repeated_too():
    collate = DataCollatorForSeq2Seq(FewTokens(), model=WithDecoderInputs())
    features = [{"input_ids": [3, 4, 5], "labels": [6, 7]}, {"input_ids": [8], "labels": [9, 10, 11]}]
    once = collate([dict(f) for f in features])
    batch = BatchAugmentationCollator(collate, 3)([dict(f) for f in features])
    assert {"input_ids", "labels", "decoder_input_ids"} <= set(batch)
    for key in batch:
        assert batch[key].shape[0] == 6, key
        assert torch.equal(batch[key], torch.cat([torch.as_tensor(once[key])] * 3)), key


def test_masked_language_modelling_may_draw_its_masks_for_each_copy():
    collate = DataCollatorForLanguageModeling(FewTokens(), mlm_probability=0.5)
    features = [{"input_ids": list(range(2, 18))} for _ in range(3)]
    shared = BatchAugmentationCollator(collate, 2)(features)
    assert torch.equal(*unfold(shared["input_ids"], 2))
    own = BatchAugmentationCollator(collate, 2, collate_each_copy=True)(features)
    assert own["input_ids"].shape == (6, 16)
    assert not torch.equal(*unfold(own["input_ids"], 2))
    with pytest.raises(TypeError, match="joins tensors or mappings"):
        BatchAugmentationCollator(plain, 2, collate_each_copy=True)([1, 2])


@pytest.mark.trap(4)
@pytest.mark.parametrize("keyed", [True, False])
def test_a_collator_that_draws_for_each_copy_makes_a_time_major_batch_wider(keyed):
    draws = iter(range(1, 9))

    def collate(samples):  # pops, and draws one number a call
        x = torch.stack([sample.pop("x") for sample in samples], dim=1) * 100 + next(draws)
        return {"x": x, "lengths": torch.tensor([len(x)] * len(samples))} if keyed else x

    samples = [{"x": torch.arange(5) + 5 * n} for n in range(3)]  # (T, B) = (5, 3)
    batch = BatchAugmentationCollator(collate, 4, dim=1, collate_each_copy=True)(samples)
    x = batch["x"] if keyed else batch
    assert x.shape == (5, 4 * 3)
    for m in range(4):
        for n in range(3):
            assert x[:, 3 * m + n].tolist() == [100 * (t + 5 * n) + m + 1 for t in range(5)]
    assert not keyed or batch["lengths"].tolist() == [5] * 12
    assert all("x" in sample for sample in samples)


def test_the_words_of_a_row_are_those_of_its_sample():
    encoding = word_tokenizer()(["w3 w4 w5", "w6", "w7 w8"], padding=True, return_tensors="pt")
    repeated = repeat_batch(encoding, 4)
    for m in range(4):
        for n in range(3):
            assert repeated.word_ids(3 * m + n) == encoding.word_ids(n)
    assert encoding.word_ids(0) != encoding.word_ids(1)


def test_numpy_arrays_are_repeated_like_tensors():
    batch: dict[str, Any] = {"input_ids": torch.ones(2, 3), "weights": np.array([0.25, 0.75])}
    assert repeat_batch(batch, 2)["weights"].tolist() == [0.25, 0.75] * 2


# ---- batches that can be read in two ways


@pytest.mark.trap(56)
@pytest.mark.parametrize(
    ("batch", "key"),
    [
        ({"labels": torch.arange(3), "images": [torch.ones(3, 4, 4)] * 3}, "batch.images is a list of 3"),
        ({"labels": torch.arange(2), "parts": [{"boxes": torch.ones(2, 4)}] * 2}, "batch.parts is a list of 2"),
        ({"labels": torch.arange(3), "position_ids": torch.ones(3, 3, 5)}, r"batch.position_ids has shape \(3, 3, 5\)"),
    ],
)
def test_what_can_be_read_in_two_ways_is_refused_by_its_key(batch, key):
    with pytest.raises(ValueError, match=f"{key}.*it can be read as one item for each sample and as whole tensors"):
        repeat_batch(batch, 2)


@pytest.mark.trap(56)
def test_what_can_be_read_in_one_way_is_repeated_so():
    images = [torch.full((3, 4, 4), float(n)) for n in range(2)]
    positions = torch.arange(30).view(3, 2, 5)
    batch: dict[str, Any] = {
        "labels": torch.arange(2),
        "images": images,
        "position_ids": positions,
    }
    out: dict[str, Any] = repeat_batch(batch, 2)
    assert [float(image.mean()) for image in out["images"]] == [0.0, 1.0, 0.0, 1.0]
    assert torch.equal(out["position_ids"], torch.cat([positions] * 2, 1))
    pixels, targets = torch.arange(2.0).view(2, 1), [{"labels": torch.ones(5)}, {"labels": torch.ones(7)}]
    both = repeat_batch((pixels, targets), 2, num_samples=2)
    assert isinstance(both, tuple)
    assert both[0].flatten().tolist() == [0, 1, 0, 1]
    assert [len(target["labels"]) for target in both[1]] == [5, 7, 5, 7]


@pytest.mark.trap(56)
def test_labels_of_detection_targets_are_not_taken_for_the_batch():
    batch = {"pixel_values": torch.ones(3, 3, 4, 4), "targets": [{"labels": torch.ones(n)} for n in (5, 5, 5)]}
    out = repeat_batch(batch, 2, num_samples=3)
    assert len(out["targets"]) == 6
    with pytest.raises(ValueError, match="the number of samples is not clear"):
        repeat_batch(batch, 2)
