"""What people put on top of a loaded checkpoint: lm-eval's model class and PEFT's LoRA."""

import pytest
import torch
from support.models import read_json, tiny_tokenizer
from support.modules import TARGETS, loaded, logits, save_compressed, tokens
from support.sameness import COMPUTED, assert_same_output
from transformers.quantizers import AutoQuantizationConfig

import compressor.hf  # noqa: F401  registers the format
from compressor.linears import LowRank

KINDS = list(TARGETS)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict:
    """Compressed folder with tokenizer of each architecture. Read only."""
    return {
        kind: save_compressed(tmp_path_factory.mktemp("compressed") / kind, kind) for kind in KINDS
    }


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.parametrize("kind", KINDS)
def test_lm_eval_reads_the_folder_and_takes_the_model(kind, checkpoints):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    folder = checkpoints[kind]
    spec = read_json(folder / "config.json")["quantization_config"]
    assert AutoQuantizationConfig.from_dict(spec).to_dict() == spec
    texts = [
        Instance("loglikelihood_rolling", {}, (text,), index)
        for index, text in enumerate(("w3 w4 w5 w6", "w90 w8 w7"))
    ]
    scores = []
    for pretrained in (str(folder), loaded(folder)):
        harness = HFLM(
            pretrained=pretrained,
            tokenizer=tiny_tokenizer(),
            device="cpu",
            dtype="float32",
            batch_size=2,
            max_length=64,
        )
        assert sum(isinstance(module, LowRank) for module in harness.model.modules()) == len(
            TARGETS[kind]
        )
        scores.append(harness.loglikelihood_rolling(texts, disable_tqdm=True))
    assert scores[0] == pytest.approx(scores[1], rel=COMPUTED[torch.float32])
    assert all(score < 0 for score in scores[0])


ADAPTED = {
    "leaf names": {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "c_proj", "c_fc"]},
    "full names": {kind: list(targets) for kind, targets in TARGETS.items()},
    "all-linear": dict.fromkeys(KINDS, "all-linear"),
}


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("targets", list(ADAPTED))
@pytest.mark.parametrize("kind", KINDS)
def test_lora_on_top_starts_equal_and_trains(kind, targets, checkpoints, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    folder = checkpoints[kind]
    expected = logits(loaded(folder))
    settings = LoraConfig(r=2, target_modules=ADAPTED[targets][kind], task_type="CAUSAL_LM")
    model = get_peft_model(loaded(folder), settings)
    adapted = {
        name for name, module in model.get_base_model().named_modules() if hasattr(module, "lora_A")
    }
    assert adapted >= TARGETS[kind].keys()
    assert_same_output(logits(model), expected)  # B starts at zero
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trainable, lr=0.01)
    losses = []
    for _ in range(3):
        loss = model(input_ids=tokens(), labels=tokens()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[0]
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(loaded(folder), tmp_path)
    assert_same_output(logits(again), logits(model.eval()))


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("target", list(TARGETS["llama"]))
def test_merging_lora_into_factors_is_refused(target, safe, checkpoints):
    """A merged weight has no room for a higher rank: PEFT's in-place sum meets another shape, and
    nothing changes.
    """
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        loaded(checkpoints["llama"]),
        LoraConfig(r=2, target_modules=[target], init_lora_weights=False),
    )
    before = logits(model)
    with pytest.raises(RuntimeError, match=r"size|shape"):
        model.merge_and_unload(safe_merge=safe)
    assert torch.equal(logits(model), before)


def test_dora_on_factors_is_refused(checkpoints):
    from peft import LoraConfig, get_peft_model

    with pytest.raises(RuntimeError, match=r"size|shape"):
        get_peft_model(
            loaded(checkpoints["llama"]),
            LoraConfig(r=2, target_modules=list(TARGETS["llama"]), use_dora=True),
        )
