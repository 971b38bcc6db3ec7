"""Marian's files against transformers' model with random weights, and our export and its re-import."""

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

ENTRIES, WIDTH, HEADS, FEEDFORWARD, LAYERS, POSITIONS = 23, 16, 2, 24, 2, 40
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
    "longest": POSITIONS,
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


def randomised(model: nn.Module) -> Any:
    """The model in float64, with random parameters and output bias of standard deviation 0.3."""
    rng = generator("marian")
    for name, parameter in model.double().named_parameters():
        if "embed_positions" not in name:
            nn.init.normal_(parameter, float(name.endswith("norm.weight")), 0.3, generator=rng)
    if isinstance(getattr(model, "final_logits_bias", None), Tensor):
        model.final_logits_bias.normal_(std=0.3, generator=rng)
    return model.eval()


def ours(options: dict[str, Any] = MODEL, entries: int = ENTRIES + 1) -> Transformer:
    sections = {
        "positions": PositionOptions(**options["positions"]),
        "blocks": TranslatorBlockOptions(**options["blocks"]),
    }
    joint = options["tied"] == "all"
    return Transformer(vocabularies=(entries, entries), joint=joint, **options | sections).double().eval()


def theirs(**changes: Any) -> Any:
    """A random MarianMTModel with our sines; its own are equal up to rounding."""
    sublayers = {f"{side}_{key}": n for side in ("encoder", "decoder")
             for key, n in (("attention_heads", HEADS), ("ffn_dim", FEEDFORWARD))}  # fmt: skip
    ids = {"pad_token_id": ENTRIES - 1, "decoder_start_token_id": ENTRIES - 1, "eos_token_id": 0}
    options = {"scale_embedding": True, "activation_function": "swish", "forced_eos_token_id": None}
    options |= {"encoder_layers": LAYERS, "decoder_layers": LAYERS + 1, "max_position_embeddings": POSITIONS}
    config = transformers.MarianConfig(vocab_size=ENTRIES, d_model=WIDTH, **{**sublayers, **ids, **options, **changes})
    return with_our_sines(randomised(transformers.MarianMTModel(config)))


def with_our_sines(model: Any) -> Any:
    for stack in (model.model.encoder, model.model.decoder):
        positions = torch.arange(len(stack.embed_positions.weight), dtype=torch.float32)
        stack.embed_positions.weight.data.copy_(sine(positions, WIDTH, layout="halves"))
    return model


def sentences(low: int, high: int, lengths: tuple[int, ...] = (7, 3, 5)) -> tuple[Tensor, Tensor, Tensor]:
    """Ids from `low` to below `high`, whether they are real, both (B, N), and the lengths (B,)."""
    words = torch.randint(low, high, (len(lengths), max(lengths)), generator=generator("words"))
    real = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return words, real, torch.tensor(lengths)


def imported(
    tensors: dict[str, Any], folder: Any = None, options: dict[str, Any] = MODEL, more: int = 1
) -> Transformer:
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
@pytest.mark.parametrize(("their_options", "our_options"), IMPORTS.values(), ids=IMPORTS)
def test_an_imported_model_has_the_log_probabilities_of_transformers(their_options, our_options):
    peer = theirs(**their_options)
    model = imported(peer.state_dict(), options=MODEL | our_options)
    order = torch.tensor(marian.row_order(ENTRIES, marian.ForeignSpecialIds(0, 1, ENTRIES - 1)))[1:]  # all but PAD
    ids = torch.cat([torch.zeros(1, dtype=torch.int64), 1 + order.argsort()])[1:]  # (V',): our id of each of theirs
    source, real, lengths = sentences(0, ENTRIES)
    target = torch.cat([torch.full((3, 1), ENTRIES - 1), sentences(0, ENTRIES, (6, 6, 6))[0]], 1)
    expected = peer(input_ids=source, attention_mask=real.long(), decoder_input_ids=target).logits
    logits = model(ids[source].masked_fill(~real, PAD), lengths, ids[target])
    torch.testing.assert_close(logits[..., 1:], expected[..., order], **EXACT)
    # PAD, the additional entry, has no probability
    torch.testing.assert_close(logits.log_softmax(-1)[..., 1:], expected.log_softmax(-1)[..., order], **EXACT)
    assert expected.std() > 0.5


def test_special_entries_have_the_rows_of_marian():
    peer = theirs()
    rows = adopt(peer.state_dict(), None).weights["embedding.weight"]
    shared = peer.model.shared.weight
    for entry, row in ((BOS, ENTRIES - 1), (EOS, 0), (UNK, 1), (4, 2), (ENTRIES, ENTRIES - 2)):
        assert torch.equal(rows[entry], shared[row])
    assert not rows[PAD].any()


def test_a_file_saved_by_transformers_is_imported(tmp_path):
    """It holds shared matrices once, and no positions."""
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
        "layernorm_embedding.weight .* is unsupported",
    ),
    "pre-norm": ("model.decoder.layer_norm.weight", (WIDTH,), "decoder.layer_norm.weight .16,. is unsupported"),
    "learned positions": (
        "model.encoder.embed_positions.weight",
        (POSITIONS, WIDTH),
        "weight differs from sines in halves",
    ),
    "another bias": ("final_logits_bias", (1, ENTRIES + 3), "have 23, 23, 23, 26 entries"),
}


@pytest.mark.parametrize(("name", "shape", "message"), REFUSED.values(), ids=REFUSED)
def test_an_unsupported_tensor_is_refused(name, shape, message):
    with pytest.raises(UserError, match=message):
        adopt({**theirs().state_dict(), name: torch.ones(shape)}, None)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "bart"}, "says model_type=bart"),
        ({"decoder_start_token_id": 3, "pad_token_id": 22}, "do not start with <pad>"),
        ({"eos_token_id": 40}, r"are \[40, 1, 22\], and it has 23 entries"),
        ({"eos_token_id": 22}, r"are \[22, 1, 22\]"),
    ],
)
def test_an_unsupported_config_in_the_folder_is_refused(tmp_path, config, message):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        adopt(theirs().state_dict(), tmp_path)


# Export.


def export(tmp_path, options: dict[str, Any]) -> tuple[Transformer, Any]:
    """A random model of ours, and transformers' model of its export."""
    model = randomised(ours(options, ENTRIES))
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
    "halves": {},
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
def test_an_exported_model_has_our_logits_and_its_import_is_bit_equal(tmp_path, changes):
    options = MODEL | changes
    model, peer = export(tmp_path, options)
    order = torch.tensor(marian.exported_row_order(ENTRIES))
    ids = order.argsort()
    source, real, lengths = sentences(4, ENTRIES)
    target = torch.cat([torch.full((3, 1), BOS), sentences(0, ENTRIES, (6, 6, 6))[0]], 1)
    logits = peer(input_ids=ids[source], attention_mask=real.long(), decoder_input_ids=ids[target]).logits
    expected = model(source, lengths, target)
    torch.testing.assert_close(logits, expected[..., order], **EXACT)
    adopted = adopt(checkpoint.load(tmp_path / "model.safetensors"), tmp_path)
    state = model.state_dict()
    assert adopted.task_state == STATE and adopted.weights.keys() == state.keys()
    assert all(torch.equal(adopted.weights[name], state[name]) for name in state)


@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("beam", [1, 4])
def test_an_exported_model_generates_our_translations(tmp_path, alpha, beam):
    """Tokens and scores are equal with the options of generation_config.json alone."""
    model = randomised(ours(MODEL, ENTRIES))
    model.output_bias.data[EOS] += 4.0  # so that translations end
    method = {"method": "beam"} if beam > 1 else {"method": "greedy", "candidates": 1}
    search = SEARCH | {"alpha": alpha} | method
    exported = marian.export(MODEL, search, model.state_dict(), STATE)
    config = transformers.MarianConfig(**exported.config)
    peer = with_our_sines(transformers.MarianMTModel(config).double()).eval()
    peer.load_state_dict(exported.tensors, strict=False)
    peer.tie_weights()
    peer.generation_config = transformers.GenerationConfig(**exported.generation)
    source, real, lengths = sentences(4, ENTRIES, (7, 3, 5, 1, 6, 2))
    source = source.masked_fill(~real, PAD)
    order = torch.tensor(marian.exported_row_order(ENTRIES))
    answer = peer.generate(
        order.argsort()[source],
        attention_mask=real.long(),
        max_new_tokens=12,
        num_return_sequences=beam,
        return_dict_in_generate=True,
        output_scores=True,
    )
    beams = decode(model, source, lengths, DecodingOptions(**search), SPECIAL)
    hypotheses = [hypothesis for each in beams for hypothesis in each]
    rows = [order[row[1:]].tolist() for row in answer.sequences]
    rows = [row[: next((i for i, id in enumerate(row) if id in (EOS, BOS)), len(row))] for row in rows]
    assert [hypothesis.tokens for hypothesis in hypotheses] == rows
    assert len({len(row) for row in rows}) > 1
    if beam > 1:  # float32 sums in transformers' beam
        scores = [hypothesis.score for hypothesis in hypotheses]
        assert scores == pytest.approx(answer.sequences_scores.tolist(), abs=2e-5)


def test_the_options_of_sampling_replace_the_defaults_of_transformers(tmp_path):
    """Without them, transformers would sample from the 50 likeliest tokens."""
    model = randomised(ours(MODEL, ENTRIES))
    search = SEARCH | {"method": "sample", "temperature": 0.7, "top_k": 0, "top_p": 0.9}
    generation = transformers.GenerationConfig(**marian.export(MODEL, search, model.state_dict(), STATE).generation)
    assert (generation.do_sample, generation.temperature) == (True, 0.7)
    assert (generation.top_k, generation.top_p) == (0, 0.9)


NOT_EXPORTED = {
    "pre-norm": ({"blocks": MODEL["blocks"] | {"pre_norm": True}}, "model.blocks.pre_norm=true is unsupported"),
    "eps": ({"blocks": MODEL["blocks"] | {"norm_eps": 1e-6}}, "model.blocks.norm_eps=1e-06 is unsupported"),
    "layout": ({"positions": {"layout": "halves_t2t", "first": 0}}, "model.positions.layout=halves_t2t is unsupported"),
    "first": ({"positions": {"layout": "halves", "first": 2}}, "model.positions.first=2 is unsupported"),
}


@pytest.mark.parametrize(("changes", "message"), NOT_EXPORTED.values(), ids=NOT_EXPORTED)
def test_what_marian_cannot_express_is_refused(changes, message):
    options = MODEL | changes
    with pytest.raises(UserError, match=message):
        marian.export(options, SEARCH, ours(options).state_dict(), STATE)


def test_vocabularies_of_different_sizes_are_not_exported():
    weights = ours(MODEL | {"tied": "target"}).state_dict()
    weights["source_embedding.weight"] = torch.zeros(40, WIDTH)
    with pytest.raises(UserError, match="have 40 entries for the source and 24 for the target"):
        marian.export(MODEL | {"tied": "target"}, SEARCH, weights, STATE)


@pytest.mark.parametrize("key", ["entries", "layout", "output_bias", "task"])
def test_an_altered_file_beside_an_export_is_refused_with_the_field(key, tmp_path):
    export(tmp_path, MODEL)
    metadata = json.loads((tmp_path / marian.METADATA_FILE).read_text())
    for value in (None, 5.5, "text", []):
        (tmp_path / marian.METADATA_FILE).write_text(json.dumps({**metadata, key: value}))
        with pytest.raises(UserError, match=rf"triptych\.json, in the checkpoint's folder, was altered: {key} is "):
            adopt(safetensors.torch.load_file(tmp_path / "model.safetensors"), tmp_path)
