"""Marian's files against transformers' own model with every tensor drawn at random, and ours there and back."""

import json
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from common.decoding.decode import decode
from common.decoding.options import DecodingOptions
from common.errors import UserError
from common.files import checkpoint
from common.machine.seeds import generator
from common.nn.positions import sine
from seq2seq.importing import marian
from seq2seq.importing.adopt import adopt
from seq2seq.models.transformer import PositionOptions, Transformer, TranslatorBlockOptions
from seq2seq.tokenizers.bpe import BOS, EOS, PAD, SPECIAL, UNK

transformers = pytest.importorskip("transformers")

ENTRIES, WIDTH, HEADS, FEEDFORWARD, LAYERS, PLACES = 23, 16, 2, 24, 2, 40
EXACT = {"rtol": 0, "atol": 1e-10}  # float64
MODEL: dict[str, Any] = {
    "width": WIDTH,
    "heads": HEADS,
    "feedforward": FEEDFORWARD,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS + 1,
    "tied": "all",
    "scaled": True,
    "output_bias": True,
    "longest": PLACES,
    "positions": {"layout": "halves", "first": 0},
    "blocks": {
        "pre_norm": False,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "norm_eps": 1e-5,
        "activation": "swish",
    },
}
SEARCH: dict[str, Any] = {
    "method": "beam",
    "beam": 4,
    "penalty": "average",
    "alpha": 0.6,
    "stop": "first",
    "candidates": 4,
    "longest_factor": 0.0,
    "longest_extra": 12,
    "at_limit": "cut",
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "seed": 0,
    "attention": False,
}
STATE = {"tokenizers": ["a tokenizer's state"]}


def redrawn(model: nn.Module) -> Any:
    """In float64, every parameter and the output's bias with standard deviation 0.3."""
    drawn = generator("marian")
    for name, parameter in model.double().named_parameters():
        if "embed_positions" not in name:
            nn.init.normal_(parameter, float(name.endswith("norm.weight")), 0.3, generator=drawn)
    if isinstance(getattr(model, "final_logits_bias", None), Tensor):
        model.final_logits_bias.normal_(std=0.3, generator=drawn)
    return model.eval()


def ours(options: dict[str, Any] = MODEL, entries: int = ENTRIES + 1) -> Transformer:
    sections = {
        "positions": PositionOptions(**options["positions"]),
        "blocks": TranslatorBlockOptions(**options["blocks"]),
    }
    joint = options["tied"] == "all"
    return Transformer(vocabularies=(entries, entries), joint=joint, **options | sections).double().eval()


def theirs(**changed: Any) -> Any:
    """MarianMTModel with our sines in its table: its own are the same in double precision, rounded differently."""
    sizes = {f"{side}_{key}": n for side in ("encoder", "decoder")
             for key, n in (("attention_heads", HEADS), ("ffn_dim", FEEDFORWARD))}  # fmt: skip
    ids = {"pad_token_id": ENTRIES - 1, "decoder_start_token_id": ENTRIES - 1, "eos_token_id": 0}
    rest = {"scale_embedding": True, "activation_function": "swish", "forced_eos_token_id": None}
    rest |= {"encoder_layers": LAYERS, "decoder_layers": LAYERS + 1, "max_position_embeddings": PLACES}
    config = transformers.MarianConfig(vocab_size=ENTRIES, d_model=WIDTH, **{**sizes, **ids, **rest, **changed})
    return with_our_sines(redrawn(transformers.MarianMTModel(config)))


def with_our_sines(model: Any) -> Any:
    for stack in (model.model.encoder, model.model.decoder):
        places = torch.arange(len(stack.embed_positions.weight), dtype=torch.float32)
        stack.embed_positions.weight.data.copy_(sine(places, WIDTH, layout="halves"))
    return model


def sentences(low: int, high: int, lengths: tuple[int, ...] = (7, 3, 5)) -> tuple[Tensor, Tensor, Tensor]:
    """Ids from `low` to below `high`, which of them are real, and their counts."""
    words = torch.randint(low, high, (len(lengths), max(lengths)), generator=generator("words"))
    counts = torch.tensor(lengths)
    return words, torch.arange(max(lengths)) < counts[:, None], counts


def filled(tensors: dict[str, Any], folder: Any = None, options: dict[str, Any] = MODEL, more: int = 1) -> Transformer:
    model = ours(options, ENTRIES + more)
    model.load_state_dict(adopt(tensors, folder).weights)
    return model


IMPORTS = {
    "one matrix for all": ({}, {}),
    "a matrix for the source": ({"share_encoder_decoder_embeddings": False}, {"tied": "target"}),
    "a matrix for each": (
        {"share_encoder_decoder_embeddings": False, "tie_word_embeddings": False},
        {"tied": "none"},
    ),
    "plain embeddings": ({"scale_embedding": False}, {"scaled": False}),
}


@torch.no_grad()
@pytest.mark.parametrize(("there", "here"), IMPORTS.values(), ids=IMPORTS)
def test_an_imported_model_gives_transformers_log_probabilities(there, here):
    peer = theirs(**there)
    model = filled(peer.state_dict(), options=MODEL | here)
    order = torch.tensor(marian.row_order(ENTRIES, marian.Special(0, 1, ENTRIES - 1)))[1:]  # of all our entries but PAD
    ids = torch.cat([torch.zeros(1, dtype=torch.int64), 1 + order.argsort()])[1:]  # (V',): ours of theirs
    source, real, counts = sentences(0, ENTRIES)
    target = torch.cat([torch.full((3, 1), ENTRIES - 1), sentences(0, ENTRIES, (6, 6, 6))[0]], 1)
    expected = peer(input_ids=source, attention_mask=real.long(), decoder_input_ids=target).logits
    found = model(ids[source].masked_fill(~real, PAD), counts, ids[target])
    torch.testing.assert_close(found[..., 1:], expected[..., order], **EXACT)
    # PAD, the entry that is there too many, takes nothing away from the others
    torch.testing.assert_close(found.log_softmax(-1)[..., 1:], expected.log_softmax(-1)[..., order], **EXACT)
    assert expected.std() > 0.5


def test_our_special_entries_are_theirs():
    peer = theirs()
    rows = adopt(peer.state_dict(), None).weights["embedding.weight"]
    shared = peer.model.shared.weight
    for mine, row in ((BOS, ENTRIES - 1), (EOS, 0), (UNK, 1), (4, 2), (ENTRIES, ENTRIES - 2)):
        assert torch.equal(rows[mine], shared[row])
    assert not rows[PAD].any()


def test_a_file_that_transformers_saved_comes_in(tmp_path):
    """Which leaves out the matrices that are there twice, and the positions."""
    peer = theirs()
    peer.save_pretrained(tmp_path)
    adopted = adopt(checkpoint.load(tmp_path / "model.safetensors"), tmp_path)
    expected = adopt(peer.state_dict(), None)
    assert adopted.weights.keys() == expected.weights.keys() == ours().state_dict().keys()
    assert all(torch.equal(adopted.weights[name], expected.weights[name]) for name in expected.weights)
    assert len(expected.left_out) == 2 and not adopted.left_out and adopted.task_state == {}


REFUSED = {
    "norms on embeddings": (
        "model.encoder.layernorm_embedding.weight",
        (WIDTH,),
        "layernorm_embedding.weight .* has no",
    ),
    "pre-norm": ("model.decoder.layer_norm.weight", (WIDTH,), "decoder.layer_norm.weight .16,. has no place in ours"),
    "learned positions": ("model.encoder.embed_positions.weight", (PLACES, WIDTH), "are no sines in halves"),
    "another bias": ("final_logits_bias", (1, ENTRIES + 3), "have 23, 23, 23, 26 entries"),
}


@pytest.mark.parametrize(("name", "shape", "words"), REFUSED.values(), ids=REFUSED)
def test_what_ours_has_not_is_refused(name, shape, words):
    with pytest.raises(UserError, match=words):
        adopt({**theirs().state_dict(), name: torch.ones(shape)}, None)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"model_type": "bart"}, "says model_type=bart"),
        ({"decoder_start_token_id": 3, "pad_token_id": 22}, "do not start with <pad>"),
        ({"eos_token_id": 40}, r"are \[40, 1, 22\], and it has 23 entries"),
        ({"eos_token_id": 22}, r"are \[22, 1, 22\]"),
    ],
)
def test_another_config_beside_the_file_is_refused(tmp_path, said, words):
    (tmp_path / "config.json").write_text(json.dumps(said))
    with pytest.raises(UserError, match=words):
        adopt(theirs().state_dict(), tmp_path)


# export


def written(tmp_path, options: dict[str, Any]) -> tuple[Transformer, Any]:
    """A random model of ours, and transformers' model of its exported files."""
    model = redrawn(ours(options, ENTRIES))
    exported = marian.export(options, SEARCH, model.state_dict(), STATE)
    safetensors.torch.save_file(exported.tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for name, content in (
        ("config.json", exported.config),
        ("generation_config.json", exported.generation),
        (marian.METADATA_FILE, exported.metadata),
    ):
        (tmp_path / name).write_text(json.dumps(content))
    peer, report = transformers.MarianMTModel.from_pretrained(tmp_path, dtype=torch.float64, output_loading_info=True)
    assert not report["unexpected_keys"] and not report["missing_keys"]
    return model, with_our_sines(peer).eval()


EXPORTS = {
    "as it is": {},
    "interleaved": {"positions": {"layout": "interleaved", "first": 0}},
    "no bias": {"output_bias": False, "scaled": False},
    "relu and two matrices": {"tied": "target", "blocks": MODEL["blocks"] | {"activation": "relu"}},
    "gelu and three matrices": {
        "tied": "none",
        "positions": {"layout": "interleaved", "first": 0},
        "blocks": MODEL["blocks"] | {"activation": "gelu"},
    },
}


@torch.no_grad()
@pytest.mark.parametrize("changes", EXPORTS.values(), ids=EXPORTS)
def test_an_exported_model_gives_our_logits_and_comes_back_bit_by_bit(tmp_path, changes):
    options = MODEL | changes
    model, peer = written(tmp_path, options)
    there = torch.tensor(marian.exported_row_order(ENTRIES))
    ids = there.argsort()
    source, real, counts = sentences(4, ENTRIES)
    target = torch.cat([torch.full((3, 1), BOS), sentences(0, ENTRIES, (6, 6, 6))[0]], 1)
    found = peer(input_ids=ids[source], attention_mask=real.long(), decoder_input_ids=ids[target]).logits
    expected = model(source, counts, target)
    torch.testing.assert_close(found, expected[..., there], **EXACT)
    adopted = adopt(checkpoint.load(tmp_path / "model.safetensors"), tmp_path)
    state = model.state_dict()
    assert adopted.task_state == STATE and adopted.weights.keys() == state.keys()
    assert all(torch.equal(adopted.weights[name], state[name]) for name in state)


@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("beam", [1, 4])
def test_an_exported_model_generates_our_translations(tmp_path, alpha, beam):
    """Tokens and scores, with what generation_config.json says and nothing else."""
    model = redrawn(ours(MODEL, ENTRIES))
    model.output_bias.data[EOS] += 4.0  # so that translations end
    method = {"method": "beam"} if beam > 1 else {"method": "greedy", "candidates": 1}
    search = SEARCH | {"alpha": alpha} | method
    exported = marian.export(MODEL, search, model.state_dict(), STATE)
    config = transformers.MarianConfig(**exported.config)
    peer = with_our_sines(transformers.MarianMTModel(config).double()).eval()
    peer.load_state_dict(exported.tensors, strict=False)
    peer.tie_weights()
    peer.generation_config = transformers.GenerationConfig(**exported.generation)
    source, real, counts = sentences(4, ENTRIES, (7, 3, 5, 1, 6, 2))
    source = source.masked_fill(~real, PAD)
    there = torch.tensor(marian.exported_row_order(ENTRIES))
    answer = peer.generate(
        there.argsort()[source],
        attention_mask=real.long(),
        max_new_tokens=12,
        num_return_sequences=beam,
        return_dict_in_generate=True,
        output_scores=True,
    )
    found = [one for each in decode(model, source, counts, DecodingOptions(**search), SPECIAL) for one in each]
    rows = [there[row[1:]].tolist() for row in answer.sequences]
    rows = [row[: next((i for i, id in enumerate(row) if id in (EOS, BOS)), len(row))] for row in rows]
    assert [one.tokens for one in found] == rows
    assert len({len(row) for row in rows}) > 1
    if beam > 1:  # float32 sums in transformers' beam
        assert [one.score for one in found] == pytest.approx(answer.sequences_scores.tolist(), abs=2e-5)


NOT_EXPORTED = {
    "pre-norm": ({"blocks": MODEL["blocks"] | {"pre_norm": True}}, "model.blocks.pre_norm=true has no place"),
    "eps": ({"blocks": MODEL["blocks"] | {"norm_eps": 1e-6}}, "model.blocks.norm_eps=1e-06 has no place"),
    "layout": ({"positions": {"layout": "halves_t2t", "first": 0}}, "model.positions.layout=halves_t2t has no"),
    "first": ({"positions": {"layout": "halves", "first": 2}}, "model.positions.first=2 has no place"),
}


@pytest.mark.parametrize(("changes", "words"), NOT_EXPORTED.values(), ids=NOT_EXPORTED)
def test_what_marian_cannot_express_is_refused(changes, words):
    options = MODEL | changes
    with pytest.raises(UserError, match=words):
        marian.export(options, SEARCH, ours(options).state_dict(), STATE)


def test_vocabularies_of_two_sizes_are_not_exported():
    weights = ours(MODEL | {"tied": "target"}).state_dict()
    weights["source_embedding.weight"] = torch.zeros(40, WIDTH)
    with pytest.raises(UserError, match="have 40 entries for the source and 24 for the target"):
        marian.export(MODEL | {"tied": "target"}, SEARCH, weights, STATE)
