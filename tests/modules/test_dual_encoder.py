from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from dual_encoder_helpers import (
    CLIP_END,
    LENGTH,
    PATCH,
    SHAPES,
    SIDE,
    configured,
    make_module,
    saved_dual_encoder,
    some_images,
    tiny_clip,
    tiny_processor,
    write_shapes,
)
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from module_helpers import quiet_trainer, saved_model
from peft import PeftModel
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_models import PLAIN_SCALE
from transformers import AutoModel, CLIPModel

from na_lora_lightning import GateImportanceCallback, StepScaleCallback, discover_gates
from na_lora_lightning.arguments import AdapterOptions, LoRAOptions
from na_lora_lightning.core.controller import GateController
from na_lora_lightning.core.mechanisms.importance_options import ImportanceOptions
from na_lora_lightning.core.observation.observer import ObserverOptions
from na_lora_lightning.data.classes.datamodule import LabelledImageDataModule
from na_lora_lightning.errors import ConfigurationError
from na_lora_lightning.models.dual_encoder import class_prompts, encode_prompts
from na_lora_lightning.modules.dual_encoder import DualEncoderLightningModule

NAMES = list(SHAPES)
PATCHES = (SIDE // PATCH) ** 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("dual_encoder")


@pytest.fixture(scope="module")
def train(folder: Path) -> str:
    return write_shapes(folder / "train", 8)


@pytest.fixture(scope="module")
def test(folder: Path) -> str:
    return write_shapes(folder / "test", 12, seed=1)


@pytest.fixture(scope="module")
def clip(folder: Path) -> str:
    return saved_dual_encoder(folder / "clip")


@pytest.fixture(scope="module")
def siglip(folder: Path) -> str:
    return saved_dual_encoder(folder / "siglip", "siglip")


@pytest.fixture(params=["clip", "siglip"])
def base(request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue(request.param))


def few_shot(base: str, train: str, test: str | None = None, **options: Any) -> LabelledImageDataModule:
    settings: dict[str, Any] = {"shots": 4, "batch_size": 8, "validation_batch_size": 24}
    return LabelledImageDataModule(base, train=train, test=test, **{**settings, **options})


def fitted(
    base: str, train: str, tmp_path: Path, callbacks: list[Callback], epochs: int = 4, **options: Any
) -> tuple[DualEncoderLightningModule, Trainer]:
    seed_everything(0, verbose=False)
    module = make_module(base, **options)
    trainer = quiet_trainer(tmp_path, max_epochs=epochs, callbacks=callbacks)
    trainer.fit(module, few_shot(base, train))
    return module, trainer


def lora_weights(module: DualEncoderLightningModule) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}


# ---- scores ----


@pytest.mark.parametrize("templates", [("a photo of a {}.",), ("a photo of a {}.", "a drawing of a {}.", "{}.")])
def test_logits_are_those_of_averaged_prompts(base: str, train: str, templates: tuple[str, ...]) -> None:
    module = configured(base, templates=templates).eval()
    model, batch = module.peft_model, some_images(base, train)
    prompts = [template.replace("{}", name.replace("_", " ")) for name in NAMES for template in templates]
    kind = model.get_base_model().config.model_type
    options = {"padding": True} if kind == "clip" else {"padding": "max_length", "max_length": LENGTH}
    encoded = tiny_processor(kind)(text=prompts, return_tensors="pt", **options)
    if kind == "siglip":
        del encoded["attention_mask"]
    with torch.no_grad():
        output = model(**encoded, pixel_values=batch["pixel_values"])
        texts = torch.stack(
            [chunk.mean(0) / chunk.mean(0).norm() for chunk in output.text_embeds.split(len(templates))]
        )
        expected = output.image_embeds @ texts.T * model.get_base_model().logit_scale.exp()
        expected += getattr(model.get_base_model(), "logit_bias", 0.0)
        logits = module.class_logits(batch)
    assert logits.shape == (6, len(NAMES))
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    if len(templates) == 1:
        torch.testing.assert_close(logits, output.logits_per_image, rtol=1e-5, atol=1e-5)
    # In training the same numbers come from one call, with a graph into both encoders.
    calls: list[Any] = []
    model.get_base_model().register_forward_hook(lambda *_: calls.append(None))
    trained = module.train().class_logits(batch)
    torch.testing.assert_close(trained.detach(), expected, rtol=1e-5, atol=1e-5)
    trained.sum().backward()
    assert len(calls) == 1
    moved = {name.split(".")[3] for name, p in module.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert moved == {"text_model", "vision_model"}


@pytest.mark.parametrize("kind", ["clip", "siglip", "siglip2"])
def test_gates_of_both_encoders_are_found_and_every_adapted_layer_trains(kind: str, folder: Path, train: str) -> None:
    base = saved_dual_encoder(folder / f"gates_{kind}", kind)
    module = configured(base)
    found = discover_gates(module.peft_model, module.example_inputs).require()
    parts = [(site.kind, site.activation.name, site.lora_layer_name.split(".")[0]) for site in found]
    activation = "quick_gelu" if kind == "clip" else "gelu_tanh"
    pooling = [] if kind == "clip" else [("plain", activation, "vision_model")]
    expected = [("plain", activation, f"{part}_model") for part in ("text", "text", "vision", "vision")]
    assert parts == expected + pooling
    assert not found.left_out
    module._sums(some_images(base, train)).mean_loss.backward()
    assert [name for name, p in module.named_parameters() if p.requires_grad and p.grad is None] == []


def test_statistics_are_over_words_of_prompts_and_patches_of_images(base: str, train: str) -> None:
    module = configured(base)
    gates = discover_gates(module.peft_model, module.example_inputs).require()
    controller = GateController(module.peft_model, gates, ObserverOptions(max_tokens=None))
    controller.set_importance(ImportanceOptions())
    seen, whole = {}, {}
    controller.observer.listen(lambda index, site, z, weight: seen.__setitem__(site.name, z[weight > 0].clone()))
    controller.attach([torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.1)])
    root = module.peft_model.get_base_model()
    for site in gates:
        own = root.get_submodule(site.name)
        own.register_forward_pre_hook(lambda _, args, name=site.name: whole.__setitem__(name, args[0].detach()))
    module._sums(some_images(base, train))

    lengths = [len(f"<a photo of a {name}.>".replace(" ", "").replace("_", "")) for name in NAMES]
    for site in gates:
        z = whole[site.name]
        if not site.name.startswith("text_model"):
            tokens = 1 if ".head." in site.name else PATCHES + (module.peft_model.config.model_type == "clip")
            assert z.shape[:2] == (6, tokens)
            expected = z.flatten(0, 1)
        elif module.peft_model.config.model_type == "clip":
            # One token for each letter between start and end; the ends that pad do not count.
            assert z.shape[:2] == (4, max(lengths))
            assert min(lengths) < max(lengths)
            expected = torch.cat([row[:length] for row, length in zip(z, lengths, strict=True)])
            assert int((module.get_buffer("input_ids") == CLIP_END).sum()) > 4
        else:
            # SigLIP attends to padding, and reads texts off it.
            assert z.shape[:2] == (4, LENGTH)
            expected = z.flatten(0, 1)
        assert torch.equal(seen[site.name], expected)


def test_texts_are_encoded_once_where_they_do_not_train(clip: str, train: str, test: str, tmp_path: Path) -> None:
    module = make_module(clip, parts=["vision"])
    texts: list[int] = []

    class Watch(Callback):
        def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
            root = pl_module.peft_model.get_base_model()
            root.text_model.register_forward_hook(lambda _, __, output: texts.append(len(output[0])))

    data = few_shot(clip, train)
    data.sources["validation"] = test
    mechanism = GateImportanceCallback(warmup_steps=1, allow_unmasked_gates=True)
    trainer = quiet_trainer(tmp_path, callbacks=[mechanism, Watch()], max_epochs=2, num_sanity_val_steps=1)
    trainer.fit(module, data)
    # It is watched from behind the probe for gates on. Images are embedded beside one text, for form's sake.
    assert (len(NAMES), texts.count(4), set(texts)) == (4, 1, {1, 4})
    assert all(".vision_model." in name for name, p in module.named_parameters() if p.requires_grad)
    assert float(trainer.callback_metrics["validation/accuracy"]) > 0.25


# ---- the two mechanisms ----


def test_full_mask_and_unit_scale_are_bitwise_plain_lora(base: str, train: str, tmp_path: Path) -> None:
    scale = StepScaleCallback(eta_min=1.0, matrix_a_factor=1.0)
    neutral = [GateImportanceCallback(keep_fraction=1.0, warmup_steps=0), scale]
    plain, _ = fitted(base, train, tmp_path, [])
    watched, _ = fitted(base, train, tmp_path, [*neutral])
    masked, _ = fitted(base, train, tmp_path, [GateImportanceCallback(warmup_steps=0), StepScaleCallback()])
    assert set(lora_weights(plain)) == set(lora_weights(watched))
    assert all(torch.equal(weight, lora_weights(watched)[name]) for name, weight in lora_weights(plain).items())
    assert any(not torch.equal(weight, lora_weights(masked)[name]) for name, weight in lora_weights(plain).items())


def test_a_masked_row_does_not_move(base: str, train: str, tmp_path: Path) -> None:
    importance = GateImportanceCallback(keep_fraction=0.5, warmup_steps=2, refresh_every=1000)
    rows: list[list[torch.Tensor]] = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            if trainer.global_step >= 3:
                gates = importance.controller.gates  # type: ignore[union-attr]
                rows.append([site.parameters()[0].parameter.detach()[site.rows].clone() for site in gates])

    fitted(base, train, tmp_path, [importance, StepScaleCallback(), Watch()])
    controller = importance.controller
    assert controller is not None
    assert controller.importance is not None
    sites = controller.importance.weights.split([site.channels for site in controller.gates])
    for first, last, weights in zip(rows[0], rows[-1], sites, strict=True):
        assert int((weights == 0).sum()) == len(weights) // 2
        assert torch.equal(first[weights == 0], last[weights == 0])
        assert bool(first[weights == 0].any())
        assert bool((first != last)[weights > 0].any(dim=1).all())


def test_few_shots_suffice_for_an_easy_task(base: str, train: str, test: str, tmp_path: Path) -> None:
    mechanisms = [GateImportanceCallback(warmup_steps=2, refresh_every=4), StepScaleCallback()]
    seed_everything(0, verbose=False)
    module, data = make_module(base), few_shot(base, train, test)
    trainer = quiet_trainer(tmp_path, max_epochs=15, callbacks=mechanisms)
    (before,) = trainer.test(module, data, verbose=False)
    trainer.fit(module, data)
    (after,) = trainer.test(module, data, verbose=False)
    assert before["test/accuracy"] <= 0.5
    assert after["test/accuracy"] >= 0.9
    assert after["test/loss"] < before["test/loss"]


def test_each_activation_has_curves_and_a_scale_of_its_own(folder: Path, train: str, tmp_path: Path) -> None:
    base = saved_dual_encoder(folder / "two", text_activation="gelu")
    logger, scale = TensorBoardLogger(tmp_path), StepScaleCallback(**PLAIN_SCALE)
    trainer = quiet_trainer(tmp_path, callbacks=[GateImportanceCallback(warmup_steps=1), scale], logger=logger)
    trainer.fit(make_module(base), few_shot(base, train))
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    for group in ("responsiveness", "step_scale", "mask_churn", "selection_misalignment"):
        for activation in ("quick_gelu", "gelu"):
            assert len(events.Scalars(f"gates/{group}/{activation}")) == 2, (group, activation)
    last = [events.Scalars(f"gates/step_scale/{activation}")[-1].value for activation in ("quick_gelu", "gelu")]
    assert last[0] != last[1]
    assert all(0.1 <= value < 1.0 for value in last)
    assert len(events.Scalars("train/loss")) == 2


# ---- adapters and checkpoints ----


def test_adapter_loads_in_plain_peft_and_merges(base: str, train: str, tmp_path: Path) -> None:
    mechanisms: list[Callback] = [GateImportanceCallback(warmup_steps=1), StepScaleCallback()]
    adapter = AdapterOptions(folder=str(tmp_path / "adapter"))
    module, _ = fitted(base, train, tmp_path, mechanisms, adapter=adapter)
    batch = some_images(base, train)
    inputs = {**module._prompts(), "pixel_values": batch["pixel_values"]}

    plain = PeftModel.from_pretrained(AutoModel.from_pretrained(base), str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        expected = module.peft_model.eval()(**inputs).logits_per_image
        torch.testing.assert_close(plain(**inputs).logits_per_image, expected)
        merged = plain.merge_and_unload()
        torch.testing.assert_close(merged(**inputs).logits_per_image, expected, rtol=1e-4, atol=1e-4)
        untrained = AutoModel.from_pretrained(base).eval()(**inputs).logits_per_image
    assert not torch.allclose(untrained, expected, atol=1e-2)


def test_checkpoint_holds_the_adapter_and_the_classes(clip: str, train: str, test: str, tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path / "checkpoints", save_last=True)
    seed_everything(0, verbose=False)
    module, data = make_module(clip, templates=["{}."]), few_shot(clip, train, test)
    data.sources["predict"] = test
    trainer = quiet_trainer(tmp_path, enable_checkpointing=True, callbacks=[saver])
    trainer.fit(module, data)
    saved = torch.load(saver.last_model_path, weights_only=True)
    assert saved["state_dict"]
    assert all(".lora_" in name for name in saved["state_dict"])
    assert not {"loss", "evaluation"} & set(saved["hyper_parameters"])

    loaded = DualEncoderLightningModule.load_from_checkpoint(saver.last_model_path)
    assert (loaded.class_names, loaded.templates) == (NAMES, ["{}."])
    batch = some_images(clip, train)
    with torch.no_grad():
        assert torch.equal(loaded.eval().class_logits(batch), module.eval().class_logits(batch))
    predictions = trainer.predict(loaded, data)
    assert predictions is not None
    named = [name for names in predictions for name in names]
    assert len(named) == 48
    assert set(named) <= set(NAMES)
    # Other classes can be told by the same adapter.
    other = configured(clip, class_names=["circle", "square", "bar"])
    assert other.class_logits(batch).shape == (6, 3)


# The resumed fit goes on in the folder of the first.
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning")
def test_resumed_training_equals_uninterrupted_training(clip: str, train: str, tmp_path: Path) -> None:
    def run(**options: Any) -> dict[str, torch.Tensor]:
        seed_everything(0, verbose=False)
        module = make_module(clip, lora=LoRAOptions(r=2, alpha=4, dropout=0.2))
        saver = ModelCheckpoint(tmp_path / "steps", every_n_train_steps=3, save_top_k=-1)
        callbacks = [saver, GateImportanceCallback(warmup_steps=1, refresh_every=2), StepScaleCallback()]
        trainer = quiet_trainer(tmp_path, max_epochs=3, enable_checkpointing=True, callbacks=callbacks)
        trainer.fit(module, few_shot(clip, train, augmentation=True), **options)
        return lora_weights(module)

    whole = run()
    resumed = run(ckpt_path=tmp_path / "steps" / "epoch=1-step=3.ckpt")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_gradient_checkpointing_gives_the_same_gradients(base: str, train: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        module = configured(base, gradient_checkpointing=checkpointing)
        module.peft_model.train()
        module._sums(some_images(base, train)).mean_loss.backward()
        gradients.append([p.grad for p in module.parameters() if p.requires_grad])
    assert all(gradient is not None and gradient.any() for gradient in gradients[1])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


def test_accumulated_micro_batches_weigh_every_image_alike(clip: str, train: str, tmp_path: Path) -> None:
    def trained(batch_size: int, accumulate: int) -> dict[str, torch.Tensor]:
        seed_everything(0, verbose=False)
        module = make_module(clip, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1))
        trainer = quiet_trainer(tmp_path, accumulate_grad_batches=accumulate)
        trainer.fit(module, few_shot(clip, train, shots=2, batch_size=batch_size))
        return lora_weights(module)

    whole, parts = trained(8, 1), trained(3, 3)
    assert max(float((whole[name] - parts[name]).abs().max()) for name in whole) < 1e-6


def test_patches_of_any_aspect_ratio(folder: Path, train: str, tmp_path: Path) -> None:
    base = saved_dual_encoder(folder / "naflex", "siglip2")
    # The head makes one token of the patches of an image, to which their mask does not apply.
    lora = LoRAOptions(r=4, alpha=8, exclude_modules=["vision_model.head.mlp.fc1"])
    importance = GateImportanceCallback(warmup_steps=1, allow_unmasked_gates=True)
    fitted(base, train, tmp_path, [importance], lora=lora)
    assert importance.controller is not None
    assert len(importance.controller.gates) == 4
    batch = some_images(base, train)
    assert batch["pixel_values"].shape == (6, 6, 3 * PATCH**2)
    assert batch["spatial_shapes"].tolist() == [[2, 3]] * 6


def test_the_lightning_cli_takes_module_and_data(clip: str, train: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["fit"])
    # Lightning calls it by an old name.
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    arguments = [f"--model.model_name_or_path={clip}", "--model.parts=[vision]", "--model.lora.r=2"]
    arguments += [
        "--model.templates=['{} on black.']",
        "--model.optimizer=torch.optim.AdamW",
        "--model.optimizer.lr=0.01",
    ]
    arguments += [f"--data.processor_name_or_path={clip}", f"--data.train={train}", "--data.shots=2"]
    cli = LightningCLI(
        DualEncoderLightningModule,
        LabelledImageDataModule,
        args=[*arguments, "--trainer.logger=false"],
        run=False,
        auto_configure_optimizers=False,
        save_config_callback=None,
    )
    assert (cli.model.templates, cli.model.lora.r, cli.model.lora.parts) == (["{} on black."], 2, ["vision"])
    assert cli.datamodule.hparams["shots"] == 2


# ---- what is refused ----


def test_a_model_of_another_type_is_refused(tmp_path: Path) -> None:
    module = make_module(saved_model(tmp_path / "llama"), class_names=NAMES)
    with pytest.raises(ConfigurationError, match="is of type 'llama', which is not a dual encoder") as caught:
        module.configure_model()
    assert str(caught.value).count(". ") == 0
    tiny_clip().vision_model.save_pretrained(tmp_path / "vision")
    with pytest.raises(ConfigurationError, match="is of type 'clip_vision_model'"):
        make_module(str(tmp_path / "vision"), class_names=NAMES).configure_model()


def test_an_incomplete_model_is_refused(tmp_path: Path) -> None:
    model = tiny_clip()
    state = {name: tensor for name, tensor in model.state_dict().items() if "text_projection" not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ConfigurationError, match=r"lacks weights \(such as 'text_projection.weight'"):
        make_module(str(tmp_path), class_names=NAMES).configure_model()


def test_prompts_that_cannot_work_are_refused(clip: str) -> None:
    module, long = configured(clip), "a" * (LENGTH - 1)
    with pytest.raises(ConfigurationError, match=f"has {LENGTH + 1} tokens, and the text encoder takes {LENGTH}"):
        encode_prompts(tiny_processor("clip").tokenizer, module.peft_model.config, class_prompts([long], ["{}"]))
    config = CLIPModel.config_class.from_pretrained(clip)
    config.text_config.eos_token_id = 5
    with pytest.raises(ConfigurationError, match=f"ends prompts in the token {CLIP_END}"):
        encode_prompts(tiny_processor("clip").tokenizer, config, ["a cat."])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"templates": ["a photo."]}, r"template 'a photo\.' has no '{}'"),
        ({"templates": []}, "templates is empty"),
        ({"parts": ["language"]}, "names no part, or an unknown one"),
        ({"parts": []}, "names no part"),
        ({"lora": LoRAOptions(parts=["vision"])}, "leave it out and set parts"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        DualEncoderLightningModule("x", **options)


def test_classes_that_do_not_fit_are_refused(clip: str, train: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"was given the classes \['cat', 'dog'\] and the data has"):
        quiet_trainer(tmp_path).fit(make_module(clip, class_names=["cat", "dog"]), few_shot(clip, train))
    module = make_module(clip)
    module.configure_model()
    with pytest.raises(ConfigurationError, match="has no classes yet"):
        module.class_logits(some_images(clip, train))
    with pytest.raises(ConfigurationError, match="there are no classes to make prompts of"):
        quiet_trainer(tmp_path).validate(make_module(clip), [some_images(clip, train)])
    with pytest.raises(ConfigurationError, match=r"target_parameters is for experts"):
        make_module(clip, lora=LoRAOptions(target_parameters="all-experts")).configure_model()
