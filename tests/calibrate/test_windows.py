"""Token windows: cut, chosen, sampled, held out and compared."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.models import VOCABULARY, tiny_model, tiny_tokenizer
from tokenizers import processors

from compressor.calibrate import sampling
from compressor.calibrate import windows as data
from compressor.calibrate.sampling import sample
from compressor.calibrate.windows import (
    Windows,
    bundled,
    load_windows,
    overlap,
    split_heldout,
)
from compressor.errors import ConfigError, DataError, NumericalError
from compressor.files.bundled import bundled_folder

EOS = 2
CHAT = [{"role": "user", "content": "w5 w6"}, {"role": "assistant", "content": "w7"}]


def words(*ids):
    return " ".join(f"w{i}" for i in ids)


def write(path, text):
    path.write_text(text)
    return str(path)


def jsonl(path, *texts):
    return write(path, "".join(json.dumps({"text": text}) + "\n" for text in texts))


@pytest.fixture
def tokenizer():
    return tiny_tokenizer()


def test_text_is_tokenised_whole_and_cut_without_overlap(tmp_path, tokenizer):
    windows = load_windows(write(tmp_path / "a.txt", words(*range(3, 14))), tokenizer, 5)
    assert windows.tokens.dtype == torch.int64
    assert windows.tokens.tolist() == [[3, 4, 5, 6, 7], [8, 9, 10, 11, 12]]  # 13 is left over


def test_documents_are_joined_by_the_end_of_sequence_token(tmp_path, tokenizer):
    source = jsonl(tmp_path / "a.jsonl", words(3, 4), words(5), words(6, 7))
    assert load_windows(source, tokenizer, 7).tokens.tolist() == [[3, 4, EOS, 5, EOS, 6, 7]]


def test_special_tokens_of_the_tokenizer_stay_and_are_not_doubled(tmp_path, tokenizer):
    template = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    tokenizer.backend_tokenizer.post_processor = template
    source = jsonl(tmp_path / "a.jsonl", words(3), words(4))
    assert load_windows(source, tokenizer, 6).tokens.tolist() == [[1, 3, EOS, 1, 4, EOS]]


def test_many_documents_are_tokenised_in_order(tmp_path, tokenizer):
    ids = [3 + i % 90 for i in range(600)]
    source = jsonl(tmp_path / "a.jsonl", *(words(i) for i in ids))
    assert load_windows(source, tokenizer, 1199).tokens[0, ::2].tolist() == ids


def test_chat_messages_go_through_the_template(tmp_path, tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}{{ 'w10 ' if m.role == 'user' else 'w11 ' }}{{ m.content }} {% "
        "endfor %}"
    )
    path = write(tmp_path / "a.jsonl", json.dumps({"messages": CHAT}) + "\n")
    assert load_windows(path, tokenizer, 5, chat_template=True).tokens.tolist() == [
        [10, 5, 6, 11, 7]
    ]


def test_chat_and_text_are_not_confused(tmp_path, tokenizer):
    chat = write(tmp_path / "chat.jsonl", json.dumps({"messages": CHAT}) + "\n")
    text = write(tmp_path / "a.txt", words(3, 4))
    with pytest.raises(
        DataError, match="chat_template was asked for, but the tokenizer of the model has none"
    ):
        load_windows(chat, tokenizer, 2, chat_template=True)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match="the column holds chat messages; set chat_template: true"):
        load_windows(chat, tokenizer, 2)
    with pytest.raises(DataError, match="the column holds text; unset chat_template"):
        load_windows(text, tokenizer, 2, chat_template=True)
    with pytest.raises(
        DataError, match="refuses a conversation of 2 messages: roles must alternate"
    ):
        load_windows(chat, tokenizer, 2, chat_template=True)


def test_text_shorter_than_a_window_is_refused_with_counts(tmp_path, tokenizer):
    with pytest.raises(DataError, match="4 tokens of text, where one window needs 5"):
        load_windows(write(tmp_path / "a.txt", words(3, 4, 5, 6)), tokenizer, 5)


def test_text_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(DataError, match="text needs a tokenizer"):
        load_windows(write(tmp_path / "a.txt", words(3)), None, 1)


def test_fewer_windows_than_asked_for_is_a_warning_with_counts(text_file, tokenizer, caplog):
    windows = load_windows(str(text_file), tokenizer, 1000, 9)
    assert windows.tokens.shape == (6, 1000)
    assert "6 windows of 1000 tokens, where 9 were asked for" in caplog.text


def test_windows_are_chosen_evenly_and_by_seed(text_file, tokenizer, caplog):
    everything = load_windows(str(text_file), tokenizer, 10).tokens
    assert everything.shape == (600, 10)
    chosen = {seed: load_windows(str(text_file), tokenizer, 10, 20, seed=seed) for seed in (0, 1)}
    again = load_windows(str(text_file), tokenizer, 10, 20, seed=0)
    assert torch.equal(chosen[0].tokens, again.tokens) and chosen[0].digest == again.digest
    assert chosen[0].digest != chosen[1].digest
    for windows in chosen.values():
        positions = [
            (everything == window).all(1).nonzero()[0, 0].item() for window in windows.tokens
        ]
        assert [position // 30 for position in positions] == list(
            range(20)
        )  # one from each stretch of thirty
    assert caplog.text == ""


def test_asking_for_all_windows_gives_them_in_order(text_file, tokenizer):
    everything = load_windows(str(text_file), tokenizer, 10)
    assert load_windows(str(text_file), tokenizer, 10, 600, seed=3).digest == everything.digest


def test_a_library_is_not_read_for_a_few_windows(text_file, tokenizer, monkeypatch, caplog):
    monkeypatch.setattr(data, "READ_LEAST", 400)
    windows = load_windows(str(text_file), tokenizer, 10, 2)
    everything = load_windows(str(text_file), tokenizer, 10).tokens
    assert all(
        any(torch.equal(window, known) for known in everything[: 640 // 30])
        for window in windows.tokens
    )
    assert "only the first 640 of" in caplog.text


@pytest.fixture
def token_file(tmp_path):
    tokens = torch.arange(3, 63, dtype=torch.int32).view(6, 10)
    tensors = {
        "calibration": tokens,
        "floats": tokens.float(),
        "flat": tokens[0].clone(),
        "flags": tokens > 5,
    }
    save_file(
        tensors | {"empty": tokens[:0].clone(), "high": tokens + 40, "low": tokens - 5},
        tmp_path / "tokens.safetensors",
    )
    return tmp_path / "tokens.safetensors"


def test_token_windows_are_taken_as_they_are(token_file):
    windows = load_windows(f"{token_file}:calibration", None, 10, 6)
    assert windows.tokens.dtype == torch.int64
    assert torch.equal(windows.tokens, torch.arange(3, 63).view(6, 10))
    assert load_windows(f"{token_file}:calibration", None, 10, 3).tokens.shape == (3, 10)


@pytest.mark.parametrize("length", [9, 11])
def test_token_windows_of_another_length_are_refused(token_file, length):
    with pytest.raises(
        DataError,
        match=f"its windows have 10 tokens, where {length} were asked for; set the length to 10",
    ):
        load_windows(f"{token_file}:calibration", None, length)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("calibratoin", "holds no tensor 'calibratoin'; did you mean 'calibration'"),
        ("floats", r"torch.float32 of shape \(6, 10\), where integer token windows"),
        ("flags", "torch.bool"),
        ("flat", r"shape \(10,\)"),
        ("empty", r"shape \(0, 10\)"),
    ],
)
def test_tensors_that_are_no_windows_are_refused(token_file, key, message):
    with pytest.raises(DataError, match=message):
        load_windows(f"{token_file}:{key}", None, 10)


def test_damaged_and_missing_token_files_are_refused(token_file):
    token_file.write_bytes(token_file.read_bytes()[:-7])
    with pytest.raises(DataError, match="damaged safetensors file"):
        load_windows(f"{token_file}:calibration", None, 10)
    token_file.unlink()
    with pytest.raises(DataError, match=r"tokens\.safetensors: no such file"):
        load_windows(f"{token_file}:calibration", None, 10)


def test_windows_must_fit_the_model(token_file, text_file, tokenizer):
    model = tiny_model("llama")
    assert len(load_windows(f"{token_file}:calibration", None, 10, model=model).tokens) == 6
    with pytest.raises(
        DataError, match=f"token ids 43 … 102 do not fit the model's vocabulary of {VOCABULARY}"
    ):
        load_windows(f"{token_file}:high", None, 10, model=model)
    with pytest.raises(DataError, match="token ids -2 … 57"):
        load_windows(f"{token_file}:low", None, 10, model=model)
    with pytest.raises(DataError, match="windows of 129 tokens, but the model has 128 positions"):
        load_windows(str(text_file), tokenizer, 129, model=model)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_sampling_with_a_cache_equals_sampling_without(kind, monkeypatch):
    monkeypatch.setattr(sampling, "SAMPLE_BATCH", 3)
    model = tiny_model(kind)
    generator = torch.Generator().manual_seed(7)
    batches = []
    for rows in (3, 2):
        tokens = torch.ones(rows, 1, dtype=torch.int64)  # BOS
        while tokens.shape[1] < 6:
            with torch.no_grad():
                chances = model(input_ids=tokens, use_cache=False).logits[:, -1].softmax(-1)
            tokens = torch.cat([tokens, torch.multinomial(chances, 1, generator=generator)], dim=1)
        batches.append(tokens)
    assert torch.equal(sample(model, 5, 6, seed=7), torch.cat(batches))


def test_self_is_sampled_by_seed():
    model = tiny_model("llama")
    windows = [load_windows("self", None, 8, 4, seed=seed, model=model) for seed in (0, 0, 1)]
    assert windows[0].tokens.shape == (4, 8)
    assert windows[0].digest == windows[1].digest != windows[2].digest


def test_self_needs_a_model_a_number_and_a_start():
    model = tiny_model("llama")
    for chosen, count in ((None, 4), (model, None)):
        with pytest.raises(
            DataError,
            match="self: windows can be sampled only from a loaded model, and their number",
        ):
            load_windows("self", None, 8, count, model=chosen)
    with pytest.raises(DataError, match="windows of 200 tokens, but the model has 128 positions"):
        load_windows("self", None, 200, 1, model=model)
    model.config.bos_token_id = model.config.eos_token_id = None
    with pytest.raises(DataError, match="neither bos_token_id nor eos_token_id"):
        load_windows("self", None, 8, 1, model=model)
    model.config.eos_token_id = [EOS, 5]
    assert load_windows("self", None, 8, 1, model=model).tokens[0, 0] == EOS


def test_sampling_from_a_broken_model_stops():
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(NumericalError, match="non-finite logits at position 0"):
        sample(model, 1, 4, 0)


def test_the_digest_knows_content_and_shape():
    tokens = torch.arange(24)
    digests = {
        Windows(t, "x").digest
        for t in (tokens.view(4, 6), tokens.view(6, 4), tokens.view(4, 6) + 1)
    }
    assert len(digests) == 3
    assert Windows(tokens.view(4, 6).int(), "y").digest == Windows(tokens.view(4, 6), "x").digest
    shape = str((4, 6)).encode()
    assert (
        Windows(tokens.view(4, 6), "x").digest
        == hashlib.sha256(shape + tokens.numpy().tobytes()).hexdigest()
    )


@pytest.mark.parametrize(
    ("total", "heldout", "expected"),
    [(128, None, 16), (200, None, 16), (24, None, 3), (7, None, 0), (10, 4, 4), (10, 0, 0)],
)
def test_the_last_windows_are_held_out(total, heldout, expected):
    windows = Windows(torch.arange(total * 2).view(total, 2), "x")
    fit, held = split_heldout(windows, heldout)
    assert len(held.tokens) == expected
    assert torch.equal(torch.cat([fit.tokens, held.tokens]), windows.tokens)


def test_not_every_window_can_be_held_out():
    with pytest.raises(DataError, match="x: 3 of 3 windows cannot be held out"):
        split_heldout(Windows(torch.zeros(3, 2, dtype=torch.int64), "x"), 3)


def test_overlap_is_the_share_of_windows_with_a_known_run():
    generator = torch.Generator().manual_seed(0)
    known = torch.randint(0, 1000, (5, 64), generator=generator)
    fresh = torch.randint(0, 1000, (4, 64), generator=generator)
    fresh[1, 10:42] = known[3, 20:52]  # a run of 32, at another place
    fresh[2, 10:41] = known[3, 20:51]  # a run of 31
    assert overlap(Windows(known, "a"), Windows(fresh, "b")) == 0.25
    assert overlap(Windows(known, "a"), Windows(fresh, "b"), ngram=31) == 0.5
    assert overlap(Windows(known, "a"), Windows(known, "a")) == 1.0
    assert (
        overlap(Windows(known[:, :20], "a"), Windows(known[:, :64], "b")) == 1.0
    )  # windows shorter than a run: whole windows


def test_bundled_texts_match_their_manifest():
    manifest = json.loads((bundled_folder("calibration") / "manifest.json").read_text())
    assert set(manifest["files"]) == {bundled("calibration").name, bundled("evaluation").name}
    for name, entry in manifest["files"].items():
        content = (bundled_folder("calibration") / name).read_bytes()
        assert (hashlib.sha256(content).hexdigest(), len(content)) == (
            entry["sha256"],
            entry["bytes"],
        )
    checkpoint = bundled_folder("reference") / "model.safetensors"
    assert hashlib.sha256(checkpoint.read_bytes()).hexdigest() == manifest["checkpoint_sha256"]


def test_bundled_texts_fill_the_default_windows_and_do_not_overlap(caplog):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(bundled_folder("reference"), local_files_only=True)
    calibration = load_windows(str(bundled("calibration")), tokenizer, 512, 128)
    evaluation = load_windows(str(bundled("evaluation")), tokenizer, 512)
    assert calibration.tokens.shape == (128, 512) and len(evaluation.tokens) >= 64
    assert overlap(calibration, evaluation) == 0
    assert caplog.text == ""


def test_there_are_two_bundled_texts():
    assert isinstance(bundled("calibration"), Path)
    with pytest.raises(DataError, match="no bundled text 'evaluations'; did you mean 'evaluation'"):
        bundled("evaluations")


@pytest.mark.parametrize("source", ["self", "tokens.safetensors:key"])
@pytest.mark.parametrize(
    ("option", "name"),
    [({"column": "text"}, "column 'text'"), ({"chat_template": True}, "chat_template")],
)
def test_options_of_text_are_refused_for_windows_of_tokens(source, option, name):
    with pytest.raises(ConfigError, match=f"^{source}: {name} was asked for, but these are tokens"):
        data.load_windows(source, None, 8, 2, **option)
