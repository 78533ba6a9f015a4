"""Every initialisation of PEFT's: the same seed gives the same start, or one sentence says that it does not work."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from module_helpers import Batches, logits, quiet_trainer, saved_model, some_batches, write_records
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from na_lora_lightning.arguments import AdapterOptions, LoRAOptions
from na_lora_lightning.checkpoints.callbacks import RunCheckpoint
from na_lora_lightning.data import InstructionDataModule
from na_lora_lightning.errors import ConfigurationError
from na_lora_lightning.models.dual_encoder import add_lora_to_encoders
from na_lora_lightning.models.eva import begin_with_eva
from na_lora_lightning.modules.language import NALoRALightningModule

WORK = [True, "gaussian", "orthogonal", "pissa", "olora", "eva"]
REFUSED = ["corda", "lora_ga", "mica", "pissa_niter_4", "evil"]
# The resumed fit goes on in the folder of the first.
pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("base")
    write_records(folder / "records.jsonl", 16)
    return saved_model(folder / "model")


def module_of(base: str, initialisation: bool | str, rate: float = 1e-2, **lora: Any) -> NALoRALightningModule:
    return NALoRALightningModule(
        base,
        lora=LoRAOptions(r=2, alpha=4, init_lora_weights=initialisation, **lora),
        optimizer=partial(torch.optim.SGD, lr=rate),
    )


def fitted(base: str, folder: Path, initialisation: bool | str, validates: bool = False) -> PeftModel:
    seed_everything(0, verbose=False)
    module = module_of(base, initialisation, 0.0)
    records = str(Path(base).parent / "records.jsonl")
    data = InstructionDataModule(base, train=records, validation=records, batch_size=4)
    if validates:
        quiet_trainer(folder).validate(module, data)
    quiet_trainer(folder, max_epochs=1).fit(module, data)
    return module.peft_model


def lora_of(model: PeftModel) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters() if "lora_" in name}


@pytest.mark.parametrize("initialisation", WORK)
def test_the_same_seed_is_the_same_start(base: str, tmp_path: Path, initialisation: bool | str) -> None:
    first = lora_of(fitted(base, tmp_path / "first", initialisation))
    torch.rand(7)
    again = lora_of(fitted(base, tmp_path / "again", initialisation))
    assert first.keys() == again.keys()
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    model = fitted(base, tmp_path / "third", initialisation, validates=True)
    assert all(torch.equal(value, first[name]) for name, value in lora_of(model).items())
    torch.testing.assert_close(logits(model), logits(AutoModelForCausalLM.from_pretrained(base)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("initialisation", REFUSED)
def test_others_are_refused_by_name(initialisation: str) -> None:
    with pytest.raises(
        ConfigurationError, match=rf"lora\.init_lora_weights='{initialisation}' is not supported.*; use"
    ):
        LoRAOptions(init_lora_weights=initialisation)


def test_eva_finds_the_directions_of_the_inputs(base: str, tmp_path: Path) -> None:
    model = fitted(base, tmp_path, "eva")
    layer = model.get_submodule("base_model.model.model.layers.1.mlp.down_proj")
    data = InstructionDataModule(base, train=str(Path(base).parent / "records.jsonl"), batch_size=4, num_workers=0)
    data.setup("fit")
    seen: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    with torch.no_grad(), model.disable_adapter():
        for batch in data.train_dataloader():
            model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
            seen[-1] = seen[-1][batch["attention_mask"].bool()]
    handle.remove()
    inputs = torch.cat(seen)
    found = layer.get_parameter("lora_A.default.weight")
    captured = (inputs - inputs.mean(0)) @ found.T
    *_, vectors = torch.linalg.svd(inputs - inputs.mean(0))
    best = (inputs - inputs.mean(0)) @ vectors[:2].T
    torch.testing.assert_close(found @ found.T, torch.eye(2), rtol=0, atol=1e-4)
    # What PEFT adds up batch by batch is nearly that of all at once.
    assert captured.square().sum() > 0.95 * best.square().sum()
    assert all(not value.any() for name, value in lora_of(model).items() if "lora_B" in name)


def test_eva_trains_resumes_and_is_loaded_by_peft(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[int] = []

    def begin(*arguments: Any) -> int:
        begun.append(begin_with_eva(*arguments))
        return begun[-1]

    monkeypatch.setattr("na_lora_lightning.modules.language.begin_with_eva", begin)

    def fit(checkpoint: Path | None = None) -> NALoRALightningModule:
        seed_everything(0, verbose=False)
        module = module_of(base, "eva", rate=0.5)
        saver = RunCheckpoint(1, keep=9, dirpath=str(tmp_path / "steps"))
        data = InstructionDataModule(base, train=str(Path(base).parent / "records.jsonl"), batch_size=4)
        trainer = quiet_trainer(tmp_path, max_epochs=2, enable_checkpointing=True, callbacks=[saver])
        trainer.fit(module, data, ckpt_path=checkpoint)
        return module

    whole = fit()
    expected = lora_of(whole.peft_model)
    (middle,) = (tmp_path / "steps").glob("*step=5.ckpt")
    resumed = lora_of(fit(middle).peft_model)
    assert all(torch.equal(value, resumed[name]) for name, value in expected.items())
    # What a checkpoint replaces is not computed.
    assert begun == [4]
    assert whole.written_adapter_folder is not None
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), whole.written_adapter_folder)
    torch.testing.assert_close(logits(loaded), logits(whole.peft_model), rtol=0, atol=2e-6)
    # And it begins a fit of its own.
    further = NALoRALightningModule(
        base, adapter=AdapterOptions(start=str(whole.written_adapter_folder), write="never")
    )
    further.configure_model()
    assert all(torch.equal(value, expected[name]) for name, value in lora_of(further.peft_model).items())


def test_eva_without_enough_data_is_one_sentence(base: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"lora\.rank_pattern does not go with init_lora_weights='eva'"):
        LoRAOptions(init_lora_weights="eva", rank_pattern={"q_proj": 4})
    module = module_of(base, "eva")
    loader = Batches(some_batches(1)).train_dataloader()
    with pytest.raises(ConfigurationError, match="looks at the training data of a data module in one process"):
        quiet_trainer(tmp_path, limit_val_batches=0).fit(module, loader, loader)
    with pytest.raises(ConfigurationError, match="this model has two encoders"):
        add_lora_to_encoders(LlamaForCausalLM.from_pretrained(base), module.lora, module.source)
    few = [{name: value[:, :1] if isinstance(value, Tensor) else value for name, value in some_batches(1)[0].items()}]
    few = [{name: value[:1] for name, value in batch.items()} for batch in few]
    with pytest.raises(ConfigurationError, match=r"needs batches of at least lora\.r=2 tokens"):
        quiet_trainer(tmp_path).fit(module_of(base, "eva"), Batches(few))
    embeddings = module_of(base, "eva", target_modules=["q_proj", "embed_tokens"])
    with pytest.raises(ConfigurationError, match=r"is for linear layers, and '.*embed_tokens' is none; leave it out"):
        quiet_trainer(tmp_path).fit(embeddings, Batches(some_batches(1), some_batches(1)))
