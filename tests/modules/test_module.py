from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from module_helpers import (
    Batches,
    make_batch,
    quiet_trainer,
    record,
    saved_model,
    some_batches,
    tiny_tokenizer,
    write_records,
)

from na_lora_lightning import GateImportanceCallback, StepScaleCallback
from na_lora_lightning.arguments import (
    AdapterArguments,
    EvaluationArguments,
    LoRAArguments,
    LossArguments,
    ScheduleArguments,
)
from na_lora_lightning.data import InstructionDataModule
from na_lora_lightning.errors import ConfigurationError
from na_lora_lightning.modules import throughput
from na_lora_lightning.modules.language import NALoRALightningModule, NoTargetTokensWarning
from na_lora_lightning.modules.losses import accepts_logits_to_keep, token_sums

FAST = LoRAArguments(r=2, alpha=4)
CONSTANT = ScheduleArguments(name="constant", warmup_fraction=0.0)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.5)


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2)


def make_module(base: str, **options: Any) -> NALoRALightningModule:
    settings: dict[str, Any] = {"lora": FAST, "schedule": CONSTANT, "adapter": AdapterArguments(write="never")}
    return NALoRALightningModule(base, **{**settings, **options})


def configured(base: str, **options: Any) -> NALoRALightningModule:
    """A module with its model loaded and an adapter that does something."""
    module = make_module(base, **options)
    torch.manual_seed(3)
    module.configure_model()
    generator = torch.Generator().manual_seed(3)
    for name, parameter in module.peft_model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3, generator=generator)
    return module


def adapter_weights(module: NALoRALightningModule) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}


@pytest.fixture(params=["llama", "gpt2"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return saved_model(tmp_path / "base", request.param)


@pytest.fixture
def llama(tmp_path: Path) -> str:
    return saved_model(tmp_path / "base")


@pytest.mark.parametrize("logits", ["targets", "chunked", "all"])
def test_loss_is_the_mean_over_target_tokens(base: str, logits: Any) -> None:
    module = configured(base)
    module.eval()
    batch = some_batches(1, rows=3)[0]
    sums = token_sums(module.peft_model, batch, logits)

    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    log_probabilities = module.peft_model(**inputs).logits.detach().log_softmax(-1)
    total, correct, count = 0.0, 0, 0
    for row in range(3):
        for position in range(1, batch["labels"].shape[1]):
            target = int(batch["labels"][row, position])
            if target != -100:
                total -= float(log_probabilities[row, position - 1, target])
                correct += int(log_probabilities[row, position - 1].argmax()) == target
                count += 1
    assert count == sum(len(reference) for reference in batch["references"])
    assert sums.mean_loss.item() == pytest.approx(total / count, rel=1e-5)
    assert (int(sums.target_tokens), int(sums.correct_tokens)) == (count, correct)
    # Hugging Face's own loss is the same number.
    assert float(module.peft_model(**inputs, labels=batch["labels"]).loss.detach()) == pytest.approx(
        total / count, rel=1e-5
    )


def test_leaving_out_logits_changes_no_gradient(base: str) -> None:
    gradients = []
    for logits in ("targets", "all"):
        module = configured(base)
        module.eval()
        token_sums(module.peft_model, some_batches(1, rows=3)[0], logits).mean_loss.backward()
        gradients.append({n: p.grad for n, p in module.named_parameters() if p.requires_grad})
    assert accepts_logits_to_keep(module.peft_model)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-7)


def test_logits_only_where_there_is_a_target(llama: str) -> None:
    module = configured(llama)
    shapes = []
    module.peft_model.register_forward_hook(lambda _, __, output: shapes.append(output.logits.shape))
    batch = make_batch([record(0, 6, 2), record(1, 5, 3)])
    token_sums(module.peft_model, batch, "targets")
    token_sums(module.peft_model, batch, "all")
    # Targets at 6 and 7, and at 5, 6 and 7: predicted at positions 4, 5 and 6.
    assert shapes == [(2, 3, 64), (2, 8, 64)]


@pytest.mark.parametrize("logits", ["targets", "chunked", "all"])
def test_a_batch_without_targets_has_zero_loss_with_a_graph(llama: str, logits: Any) -> None:
    module = configured(llama)
    batch = some_batches(1)[0]
    batch["labels"] = torch.full_like(batch["labels"], -100)
    loss = token_sums(module.peft_model, batch, logits).mean_loss
    loss.backward()
    assert loss.item() == 0.0
    assert all(not p.grad.any() for p in module.parameters() if p.requires_grad and p.grad is not None)


def test_a_batch_without_targets_is_warned_of(llama: str, tmp_path: Path) -> None:
    batch = some_batches(1)[0]
    batch["labels"] = torch.full_like(batch["labels"], -100)
    module = make_module(llama)
    with pytest.warns(NoTargetTokensWarning, match="no target token"):
        quiet_trainer(tmp_path).fit(module, Batches([batch]))
    assert all(torch.isfinite(p).all() for p in module.parameters())


def test_only_float32_lora_trains_and_the_model_is_in_training_mode(tmp_path: Path, base: str) -> None:
    module = make_module(base, dtype="bfloat16")
    modes = []

    class Watch(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            modes.append(all(inner.training for inner in pl_module.model.modules()))

    trainer = quiet_trainer(tmp_path, callbacks=[Watch()], num_sanity_val_steps=1)
    trainer.fit(module, Batches(some_batches(2), some_batches(1)))
    assert modes == [True, True]
    for name, parameter in module.peft_model.named_parameters():
        assert parameter.requires_grad == ("lora_" in name)
        assert parameter.dtype == (torch.float32 if "lora_" in name else torch.bfloat16)
    stepped = [p for group in trainer.optimizers[0].param_groups for p in group["params"]]
    assert {id(p) for p in stepped} == {id(p) for p in module.parameters() if p.requires_grad}


def test_initial_adapter_depends_on_the_seed_alone(llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def initial(seed: int, consumed: int) -> torch.Tensor:
        seed_everything(seed, verbose=False)
        torch.rand(consumed)
        before = torch.random.get_rng_state()
        module = make_module(llama)
        module.configure_model()
        assert torch.equal(before, torch.random.get_rng_state())
        return torch.cat([w.flatten() for w in adapter_weights(module).values()])

    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    first = initial(5, 0)
    assert torch.equal(first, initial(5, 17))
    assert not torch.equal(first, initial(6, 0))


def test_gradient_checkpointing_gives_the_same_gradients(llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[tuple[int, ...]] = []

    class Watched(torch.autograd.graph.save_on_cpu):
        def __init__(self, pin_memory: bool) -> None:
            super().__init__(pin_memory)
            pack = self.pack_hook
            self.pack_hook = lambda tensor: moved.append(tuple(tensor.shape)) or pack(tensor)

    monkeypatch.setattr(torch.autograd.graph, "save_on_cpu", Watched)
    gradients, options = [], (False, True, "offload")
    for checkpointing in options:
        module = configured(llama, gradient_checkpointing=checkpointing)
        assert not moved
        token_sums(module.peft_model.train(), some_batches(1)[0], "targets").mean_loss.backward()
        gradients.append([p.grad for p in module.parameters() if p.requires_grad])
    # The hidden states that each of the two blocks is given, and nothing that is computed from them.
    assert moved == [(2, some_batches(1)[0]["input_ids"].shape[1], 16)] * 2
    assert all(gradient is not None and gradient.any() for gradient in gradients[1])
    for plain, checkpointed, offloaded in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)
        assert torch.equal(checkpointed, offloaded)
    with pytest.raises(ConfigurationError, match="gradient_checkpointing='disk' is unknown"):
        configured(llama, gradient_checkpointing="disk")


@pytest.mark.parametrize("average_over", ["step", "micro_batch"])
def test_accumulated_micro_batches_weigh_by_their_targets(llama: str, tmp_path: Path, average_over: Any) -> None:
    records = [record(0, 3, 2), record(1, 4, 9), record(2, 3, 5)]

    def trained(batches: list[dict[str, Any]], accumulate: int, **options: Any) -> dict[str, torch.Tensor]:
        seed_everything(0, verbose=False)
        module = make_module(llama, optimizer=sgd, **options)
        quiet_trainer(tmp_path, accumulate_grad_batches=accumulate).fit(module, Batches(batches))
        return adapter_weights(module)

    whole = trained([make_batch(records)], 1)
    # The window of four is cut short by the end of the epoch.
    parts = trained([make_batch([entry]) for entry in records], 4, loss=LossArguments(average_over=average_over))
    differences = [float((whole[name] - parts[name]).abs().max()) for name in whole]
    assert (max(differences) < 1e-6) == (average_over == "step")


def test_one_micro_batch_a_step_is_left_as_it_is(llama: str, tmp_path: Path) -> None:
    def trained(average_over: Any) -> dict[str, torch.Tensor]:
        seed_everything(0, verbose=False)
        module = make_module(llama, optimizer=adamw, loss=LossArguments(average_over=average_over))
        quiet_trainer(tmp_path).fit(module, Batches(some_batches(3)))
        return adapter_weights(module)

    step, micro_batch = trained("step"), trained("micro_batch")
    assert all(torch.equal(step[name], micro_batch[name]) for name in step)


def test_learning_rate_warms_up_and_decays(llama: str, tmp_path: Path) -> None:
    rates = []

    class Watch(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    schedule = ScheduleArguments(name="linear", warmup_fraction=0.4)
    trainer = quiet_trainer(tmp_path, max_epochs=2, callbacks=[Watch()])
    trainer.fit(make_module(llama, optimizer=adamw, schedule=schedule), Batches(some_batches(5)))
    expected = [0, 0.25, 0.5, 0.75] + [1 - step / 6 for step in range(6)]
    assert rates == pytest.approx([1e-2 * factor for factor in expected])


def test_an_endless_fit_needs_a_schedule_without_end(llama: str, tmp_path: Path) -> None:
    module = make_module(llama, schedule=ScheduleArguments())
    with pytest.raises(ConfigurationError, match="needs a fit with an end"):
        quiet_trainer(tmp_path, max_epochs=-1).fit(module, Batches(some_batches(1)))


def test_default_optimizer_is_adamw_on_a_cosine(llama: str, tmp_path: Path) -> None:
    module = NALoRALightningModule(llama, adapter=AdapterArguments(write="never"))
    trainer = quiet_trainer(tmp_path)
    trainer.fit(module, Batches(some_batches(1)))
    optimizer = trainer.optimizers[0]
    assert type(optimizer) is torch.optim.AdamW
    assert (optimizer.defaults["lr"], optimizer.defaults["weight_decay"]) == (2e-4, 0.0)


def test_metrics_are_over_all_tokens_of_uneven_batches(llama: str, tmp_path: Path) -> None:
    records = [record(seed, 3, answer) for seed, answer in enumerate([1, 9, 2, 4, 7])]
    batches = [make_batch(records[:1]), make_batch(records[1:4]), make_batch(records[4:])]
    module = configured(llama)
    (measured,) = quiet_trainer(tmp_path).validate(module, Batches([], batches), verbose=False)
    sums = token_sums(module.peft_model.eval(), make_batch(records), "all")
    loss = float(sums.negative_log_likelihood.detach()) / 23
    assert int(sums.target_tokens) == 23
    assert measured["validation/loss"] == pytest.approx(loss, rel=1e-5)
    assert measured["validation/perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
    assert measured["validation/token_accuracy"] == pytest.approx(int(sums.correct_tokens) / 23)
    assert "validation/exact_match" not in measured
    (tested,) = quiet_trainer(tmp_path).test(module, Batches([], batches), verbose=False)
    assert tested["test/loss"] == measured["validation/loss"]


def test_exact_match_counts_generated_answers(llama: str, tmp_path: Path) -> None:
    evaluation = EvaluationArguments(generate=True, max_new_tokens=3, sample_count=4)
    module = configured(llama, evaluation=evaluation)
    batches = some_batches(3, rows=2)
    predicted = quiet_trainer(tmp_path).predict(module, Batches([], batches))
    assert predicted is not None
    texts = [text for batch in predicted for text in batch]
    assert len(texts) == 6
    # Make the model right about the first and the last of the four that are sampled, and about one beyond.
    batches[0]["references"][0] = f" {texts[0]} "
    batches[1]["references"][1] = texts[3]
    batches[2]["references"][0] = texts[4]
    (measured,) = quiet_trainer(tmp_path).validate(module, Batches([], batches), verbose=False)
    assert measured["validation/exact_match"] == 0.5
    assert [answer.answer for answer in module.evaluator.answers] == texts[:4]
    assert [answer.correct for answer in module.evaluator.answers] == [True, False, False, True]


def test_prediction_without_a_data_module_uses_the_models_tokenizer(llama: str, tmp_path: Path) -> None:
    module = configured(llama, evaluation=EvaluationArguments(max_new_tokens=2))
    loader = Batches([], some_batches(1)).predict_dataloader()
    with_own = quiet_trainer(tmp_path).predict(module, loader)
    assert with_own == quiet_trainer(tmp_path).predict(module, Batches([], some_batches(1)))


# ---- checkpoints ----


def fit_with_checkpoint(llama: str, folder: Path, **options: Any) -> tuple[NALoRALightningModule, Path]:
    seed_everything(0, verbose=False)
    module = make_module(llama, optimizer=adamw, **options)
    saver = ModelCheckpoint(folder / "checkpoints", save_last=True)
    quiet_trainer(folder, enable_checkpointing=True, callbacks=[saver]).fit(module, Batches(some_batches(3)))
    return module, folder / "checkpoints" / "last.ckpt"


def test_checkpoint_holds_the_adapter_alone_in_plain_values(llama: str, tmp_path: Path) -> None:
    module, path = fit_with_checkpoint(llama, tmp_path)
    checkpoint = torch.load(path, weights_only=True)
    assert set(checkpoint["state_dict"]) == set(adapter_weights(module))
    assert all(".lora_A." in name or ".lora_B." in name for name in checkpoint["state_dict"])
    saved = sum(tensor.numel() for tensor in checkpoint["state_dict"].values())
    assert saved == module.peft_model.get_nb_trainable_parameters()[0] == 992
    assert checkpoint["hyper_parameters"]["lora"]["r"] == 2
    assert checkpoint["hyper_parameters"]["optimizer"]["class_path"] == "torch.optim.AdamW"
    assert checkpoint["hyper_parameters"]["optimizer"]["init_args"]["lr"] == 1e-2


def test_load_from_checkpoint_restores_adapter_and_options(llama: str, tmp_path: Path) -> None:
    module, path = fit_with_checkpoint(llama, tmp_path)
    loaded = NALoRALightningModule.load_from_checkpoint(path)
    assert loaded.lora == FAST
    assert loaded.schedule == CONSTANT
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), loaded.parameters(), strict=True))
    made = loaded._optimizer_factory([torch.nn.Parameter(torch.zeros(1))])
    assert (type(made), made.defaults["lr"]) == (torch.optim.AdamW, 1e-2)


def test_an_undescribable_optimizer_is_left_out_of_the_checkpoint(llama: str, tmp_path: Path) -> None:
    def needs_two(parameters: Any) -> torch.optim.Optimizer:
        parameters = list(parameters)
        return torch.optim.SGD([{"params": parameters[:1]}, {"params": [parameters[1]]}], lr=0.1)

    module = make_module(llama, optimizer=needs_two)
    assert "optimizer" not in module.hparams


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (LoRAArguments(r=4, alpha=4), r"lora\.r=2 and the current model has 4"),
        (LoRAArguments(r=2, alpha=8), r"lora\.alpha=4 and the current model has 8"),
        (LoRAArguments(r=2, alpha=4, use_rslora=True), r"lora\.use_rslora=False and the current model has True"),
        (LoRAArguments(r=2, alpha=4, target_modules=["q_proj"]), r"lora\.target_modules='all-linear'"),
        (LoRAArguments(r=2, alpha=4, init_lora_weights="pissa"), r"lora\.init_lora_weights=True"),
    ],
)
def test_checkpoint_of_other_lora_is_refused(llama: str, tmp_path: Path, lora: LoRAArguments, message: str) -> None:
    _, path = fit_with_checkpoint(llama, tmp_path)
    with pytest.raises(ConfigurationError, match=message):
        quiet_trainer(tmp_path).validate(make_module(llama, lora=lora), Batches([], some_batches(1)), ckpt_path=path)


def test_checkpoint_of_other_model_is_refused(llama: str, tmp_path: Path) -> None:
    _, path = fit_with_checkpoint(llama, tmp_path)
    other = make_module(saved_model(tmp_path / "other", "gpt2"))
    with pytest.raises(ConfigurationError, match="'llama' and the current one is 'gpt2'"):
        quiet_trainer(tmp_path).validate(other, Batches([], some_batches(1)), ckpt_path=path)


def test_state_dict_with_missing_or_unknown_tensors_is_refused(llama: str) -> None:
    module = configured(llama)
    state = adapter_weights(module)
    first = sorted(state)[0]
    with pytest.raises(ConfigurationError, match="lacks 1 tensors of the adapter"):
        module.load_state_dict({name: tensor for name, tensor in state.items() if name != first})
    with pytest.raises(ConfigurationError, match=r"that the model lacks, such as 'model\.unknown'"):
        module.load_state_dict({**state, "model.unknown": torch.zeros(1)})
    with pytest.raises(ConfigurationError, match=r"is \[3\] and in the model"):
        module.load_state_dict({**state, first: torch.zeros(3)})


def test_a_foreign_checkpoint_is_refused(llama: str) -> None:
    with pytest.raises(ConfigurationError, match="not written by NALoRALightningModule"):
        configured(llama).on_load_checkpoint({"state_dict": {}})


# The resumed fit goes on in the folder of the first.
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning")
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_resumed_training_equals_uninterrupted_training(llama: str, tmp_path: Path, dropout: float) -> None:
    records = write_records(tmp_path / "records.jsonl", 12)
    schedule = ScheduleArguments(name="cosine", warmup_steps=2)

    def fresh() -> NALoRALightningModule:
        seed_everything(0, verbose=False)
        return make_module(llama, optimizer=adamw, schedule=schedule, lora=LoRAArguments(r=2, alpha=4, dropout=dropout))

    def trainer() -> Trainer:
        saver = ModelCheckpoint(tmp_path / "steps", every_n_train_steps=4, save_top_k=-1)
        mechanisms = [GateImportanceCallback(warmup_steps=1, refresh_every=2), StepScaleCallback()]
        return quiet_trainer(tmp_path, max_epochs=2, enable_checkpointing=True, callbacks=[saver, *mechanisms])

    whole, resumed = fresh(), fresh()

    def data() -> InstructionDataModule:
        return InstructionDataModule(llama, train=records, batch_size=4)

    trainer().fit(whole, data())
    # One of three steps into the second epoch.
    trainer().fit(resumed, data(), ckpt_path=tmp_path / "steps" / "epoch=1-step=4.ckpt")
    first, second = adapter_weights(whole), adapter_weights(resumed)
    assert all(torch.equal(first[name], second[name]) for name in first)


# ---- logging and options ----


def test_tokens_per_second(llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A clock that advances by 1 s whenever it is read.
    seconds = iter(range(1000))
    monkeypatch.setattr(throughput, "perf_counter", lambda: float(next(seconds)))
    batches = some_batches(2)
    trainer = quiet_trainer(tmp_path, log_every_n_steps=2)
    trainer.fit(make_module(llama), Batches(batches))
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    targets = sum(len(reference) for batch in batches for reference in batch["references"])
    # Read at the start of training and at the report.
    assert trainer.callback_metrics["train/tokens_per_second"] == tokens
    assert trainer.callback_metrics["train/target_tokens_per_second"] == targets


def test_training_logs_the_loss_and_reports_the_parameters(
    llama: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = quiet_trainer(tmp_path)
    module = make_module(llama)
    batch = some_batches(1)[0]
    with caplog.at_level("INFO"):
        trainer.fit(module, Batches([batch]))
    assert "LoRA trains 992 of 7,472 parameters (13.3 %)." in caplog.text
    fresh = make_module(llama)
    fresh.configure_model()
    # The adapter starts from no change, and Llama has no dropout.
    loss = token_sums(fresh.peft_model, batch, "all").mean_loss
    assert float(trainer.callback_metrics["train/loss"]) == pytest.approx(float(loss.detach()), rel=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LoRAArguments(r=0), "lora.r is 0"),
        (lambda: LoRAArguments(alpha=0), "lora.alpha is 0"),
        (lambda: LoRAArguments(dropout=1.0), "lora.dropout is 1.0"),
        (lambda: LoRAArguments(target_modules=[]), "lora.target_modules is empty"),
        (lambda: LoRAArguments(bias="some"), "lora.bias='some' is unknown"),  # type: ignore[arg-type]
        (lambda: LoRAArguments(init_lora_weights="pissa_niter_4"), "'pissa_niter_4' is not supported"),
        (lambda: LossArguments(logits="some"), "loss.logits='some' is unknown"),  # type: ignore[arg-type]
        (lambda: LossArguments(average_over="x"), "loss.average_over='x' is unknown"),  # type: ignore[arg-type]
        (lambda: ScheduleArguments(warmup_fraction=1.0), "schedule.warmup_fraction is 1.0"),
        (lambda: ScheduleArguments(warmup_steps=-1), "schedule.warmup_steps is -1"),
        (lambda: EvaluationArguments(max_new_tokens=0), "evaluation.max_new_tokens is 0"),
        (lambda: EvaluationArguments(answer_pattern="("), "is not a valid regular expression"),
        (lambda: AdapterArguments(write="x"), "adapter.write='x' is unknown"),  # type: ignore[arg-type]
        (lambda: NALoRALightningModule("x", dtype="half"), "dtype='half' is unknown"),  # type: ignore[arg-type]
        (lambda: NALoRALightningModule("x", lora={"rank": 3}), "lora has no option 'rank'"),  # type: ignore[arg-type]
        (lambda: NALoRALightningModule("x").peft_model, "not loaded yet"),
    ],
)
def test_options_that_cannot_work_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message.replace("(", r"\(")):
        make()


def test_optimizer_options_that_cannot_work_are_refused(llama: str, tmp_path: Path) -> None:
    module = make_module(llama, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=-1.0))
    with pytest.raises(ConfigurationError, match="Invalid learning rate"):
        quiet_trainer(tmp_path).fit(module, Batches(some_batches(1)))
    with pytest.raises(ConfigurationError, match="is not an imported optimizer class"):
        make_module(llama, optimizer={"class_path": "os.system", "init_args": {}})


def test_tokenizer_helper_round_trips() -> None:
    tokenizer = tiny_tokenizer()
    assert tokenizer.decode(tokenizer("1+2=3")["input_ids"]) == "1+2=3"
