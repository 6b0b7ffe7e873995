"""The subject-driven example: its losses and targets, its pipelines of each kind, its scores, and the whole script."""

import importlib
import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import mapsurgery

for package in ("diffusers", "transformers", "timm", "torchvision", "PIL", "tqdm", "peft"):
    pytest.importorskip(package, reason=f"the example needs {package}")

from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler  # noqa: E402

EXAMPLES = Path(__file__).parent.parent / "examples"
SIDE = 32
"""Pixels of a side of the tiny pipelines' images."""


@pytest.fixture
def example(monkeypatch):
    """``example(name)`` imports examples/<name>.py."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# --- targets and loss -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_ddpm_targets_are_their_definitions(example, kind):
    scheduler = DDPMScheduler(prediction_type=kind)
    clean = torch.randn(6, 2, 4, 4)
    noised = example("diffusion_loss").add_noise(scheduler, clean, seeded(3))
    noise = torch.randn(clean.shape, generator=seeded(3))
    signal = scheduler.alphas_cumprod[noised.timesteps].reshape(-1, 1, 1, 1)
    expected = {
        "epsilon": noise,
        "v_prediction": signal.sqrt() * noise - (1 - signal).sqrt() * clean,
        "sample": clean,
    }[kind]
    torch.testing.assert_close(noised.sample, signal.sqrt() * clean + (1 - signal).sqrt() * noise)
    torch.testing.assert_close(noised.target, expected)
    assert noised.weight.tolist() == [1.0] * 6 and len(noised.timesteps.unique()) > 1


@pytest.mark.parametrize("weighting", ["logit_normal", "mode", "none", "sigma_sqrt"])
def test_flow_target_is_the_velocity_from_image_to_noise(example, weighting):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    clean = torch.randn(8, 2, 4, 4)
    noised = example("diffusion_loss").add_noise(scheduler, clean, seeded(1), weighting)
    noise = torch.randn(clean.shape, generator=seeded(1))
    sigma = noised.timesteps / scheduler.config.num_train_timesteps
    spread = sigma.reshape(-1, 1, 1, 1)
    torch.testing.assert_close(noised.target, noise - clean)
    torch.testing.assert_close(noised.sample, clean + spread * noised.target)
    torch.testing.assert_close(noised.weight, sigma**-2 if weighting == "sigma_sqrt" else torch.ones(8))


def test_unknown_prediction_type_is_refused(example):
    with pytest.raises(ValueError, match="'velocity'; there are epsilon"):
        example("diffusion_loss").add_noise(
            DDPMScheduler(prediction_type="velocity"), torch.zeros(1, 1, 2, 2), seeded()
        )


def test_prior_preservation_weights_the_class_like_the_naive_sum(example):
    module = example("diffusion_loss")
    prediction, target = torch.randn(5, 3, 2), torch.randn(5, 3, 2)
    weight = torch.tensor([1.0, 2.0, 0.5, 3.0, 1.5])
    noised = module.Noised(target, torch.zeros(5), target, weight)
    errors = [
        weight[i].item()
        * sum((a - b) ** 2 for a, b in zip(prediction[i].flatten(), target[i].flatten(), strict=True))
        / 6
        for i in range(5)
    ]
    naive = (errors[0] + errors[1]) / 2 + 0.3 * (errors[2] + errors[3] + errors[4]) / 3
    torch.testing.assert_close(module.prior_preservation_loss(prediction, noised, 2, 0.3), naive)
    torch.testing.assert_close(module.prior_preservation_loss(prediction, noised, 5, 0.3), sum(errors) / 5)
    for instances in (0, 6):
        with pytest.raises(ValueError, match=f"instances = {instances}, but the batch has 5"):
            module.prior_preservation_loss(prediction, noised, instances)


# --- similarity and picture -------------------------------------------------------------------------------------------


def test_similarities_are_means_of_cosines_over_pairs(example):
    module = example("image_features")
    first, second = F.normalize(torch.randn(4, 6), dim=1), F.normalize(torch.randn(3, 6), dim=1)
    pairs = [F.cosine_similarity(a, b, dim=0).item() for a in first for b in second]
    assert module.similarity(first, second) == pytest.approx(sum(pairs) / 12, abs=1e-6)
    within = [F.cosine_similarity(first[i], first[j], dim=0).item() for i in range(4) for j in range(4) if i != j]
    assert module.similarity_within(first) == pytest.approx(sum(within) / 12, abs=1e-6)
    with pytest.raises(ValueError, match="at least two"):
        module.similarity_within(first[:1])


def test_features_take_grey_as_equal_channels_and_do_not_depend_on_the_batch(example):
    features = example("image_features").load_features("test_vit", "none", 32)
    images = torch.rand(70, 1, 16, 16)
    found = features(images)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(70))
    torch.testing.assert_close(features(images[66:].expand(-1, 3, -1, -1)), found[66:], atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="'test_vit': there are packaged weights for vit_small"):
        example("image_features").load_features("test_vit", "packaged")


def test_whitened_features_are_uncorrelated_and_of_one_length(example):
    module = example("image_features")
    features = module.load_features("test_vit", "none", 32)
    images = torch.rand(40, 1, 16, 16)
    with pytest.raises(ValueError, match="40 components need more than 40 images"):
        features.whiten(images, 40)
    plain = features(images)
    features.whiten(images, 5)
    whitened = (plain - features.center) @ features.directions
    torch.testing.assert_close(whitened.T @ whitened / 40, torch.eye(5), atol=1e-3, rtol=0)
    torch.testing.assert_close(features(images), F.normalize(whitened, dim=1))


def test_grid_has_each_image_in_its_place(example, tmp_path):
    from PIL import Image

    module = example("image_grid")
    grey, colour = torch.full((2, 1, 4, 4), 0.5), torch.zeros(3, 3, 8, 8)
    colour[2, 0] = 1
    module.save_grid({"a": grey, "b": colour}, tmp_path / "new" / "grid.png", side=16)
    picture = Image.open(tmp_path / "new" / "grid.png")
    step = 16 + module.GAP
    assert picture.size == (module.LABEL_WIDTH + 3 * step, 2 * step + module.GAP)

    def pixel(row, column):
        return picture.getpixel((module.LABEL_WIDTH + column * step + 8, module.GAP + row * step + 8))

    assert [pixel(0, 1), pixel(0, 2), pixel(1, 1), pixel(1, 2)] == [(128,) * 3, (255,) * 3, (0,) * 3, (255, 0, 0)]
    with pytest.raises(ValueError, match="an image in each"):
        module.save_grid({"a": grey[:0]}, tmp_path / "grid.png")


# --- pipelines of each kind, tiny, with random weights ----------------------------------------------------------------


def tokenizer(folder: Path):
    """A CLIP tokenizer of single letters."""
    from transformers import CLIPTokenizer

    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=12)


def t5_tokenizer():
    """A T5 tokenizer of single letters."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = ["<pad>", "</s>", "<unk>", *(chr(code) for code in range(ord("a"), ord("z") + 1))]
    pieces = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(vocabulary)}, unk_token="<unk>"))
    pieces.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=pieces, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=16
    )


def clip_text(cls, width=16):
    from transformers import CLIPTextConfig

    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=54, hidden_size=width, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=12, projection_dim=width, bos_token_id=52, eos_token_id=53, pad_token_id=53,
    )  # fmt: skip
    return cls(config)


def t5_text(width=32):
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(0)
    return T5EncoderModel(T5Config(vocab_size=29, d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2))


def vae(channels=4, **options):
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=channels, norm_num_groups=4, **options,
    )  # fmt: skip


def unet(**options):
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=16, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        **options,
    )  # fmt: skip


def stable_diffusion(folder):
    from diffusers import PNDMScheduler, StableDiffusionPipeline
    from transformers import CLIPTextModel

    return StableDiffusionPipeline(
        vae(), clip_text(CLIPTextModel), tokenizer(folder / "words"), unet(cross_attention_dim=16),
        PNDMScheduler(prediction_type="v_prediction", skip_prk_steps=True), None, None, requires_safety_checker=False,
    )  # fmt: skip


def sdxl(folder):
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    denoiser = unet(
        cross_attention_dim=32, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=16 + 6 * 8,
    )  # fmt: skip
    words = tokenizer(folder / "words")
    encoders = clip_text(CLIPTextModel), clip_text(CLIPTextModelWithProjection)
    return StableDiffusionXLPipeline(
        vae(), *encoders, words, words, denoiser, EulerDiscreteScheduler(), add_watermarker=False
    )


def sd3(folder):
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import CLIPTextModelWithProjection

    torch.manual_seed(0)
    denoiser = SD3Transformer2DModel(
        sample_size=16, patch_size=1, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=4, joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=32,
    )  # fmt: skip
    words = tokenizer(folder / "words")
    encoders = clip_text(CLIPTextModelWithProjection), clip_text(CLIPTextModelWithProjection)
    return StableDiffusion3Pipeline(
        denoiser, FlowMatchEulerDiscreteScheduler(shift=3.0), vae(shift_factor=0.1, scaling_factor=1.5),
        encoders[0], words, encoders[1], words, t5_text(), t5_tokenizer(),
    )  # fmt: skip


def flux(folder):
    from diffusers import FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextModel

    torch.manual_seed(0)
    denoiser = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8), guidance_embeds=True,
    )  # fmt: skip
    return FluxPipeline(
        FlowMatchEulerDiscreteScheduler(), vae(shift_factor=0.1, scaling_factor=0.4), clip_text(CLIPTextModel),
        tokenizer(folder / "words"), t5_text(), t5_tokenizer(), denoiser,
    )  # fmt: skip


PIPELINES = {"sd": stable_diffusion, "sdxl": sdxl, "sd3": sd3, "flux": flux}


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    """``pipelines(name)`` is a folder with a pipeline of this kind, as a hub would hold it."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            root = tmp_path_factory.mktemp(name)
            PIPELINES[name](root).save_pretrained(root / "pipeline")
            made[name] = root / "pipeline"
        return made[name]

    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder with three images, not square."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("photos")
    for i in range(3):
        pixels = torch.randint(0, 255, (40, 56, 3), generator=seeded(i), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
    return folder


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in ("sd", "flux") else pytest.mark.long) for name in PIPELINES]
)
def test_pipeline_predicts_its_target_and_one_step_trains_it(example, pipelines, name):
    models, dreambooth = example("diffusion_models"), example("dreambooth_task")
    model = models.load_model(str(pipelines(name)), SIDE)
    encode = dreambooth.encode
    task = dreambooth.Task(
        model, "a sks dog", encode(model, torch.rand(2, 3, SIDE, SIDE), "a sks dog"),
        encode(model, torch.rand(3, 3, SIDE, SIDE), "a dog"), features=None, references={}, targets=("*attn*",),
        exclude=model.without_effect(), batch_size=2,
    )  # fmt: skip
    assert task.instances.latents.shape == (2, 4, SIDE // 2, SIDE // 2)
    batch = dreambooth.draw_batch(task, seeded())
    noised = model.add_noise(batch.latents, seeded())
    assert model.predict(noised, batch.condition).shape == noised.target.shape == (4, 4, SIDE // 2, SIDE // 2)

    denoiser = mapsurgery.patch(task.build(), task.targets, exclude=task.exclude, rank=2)
    mapsurgery.verify(denoiser, **dreambooth.example_inputs(task))
    before = {key: value.clone() for key, value in mapsurgery.adapter_state_dict(denoiser).items()}
    losses = dreambooth.train(denoiser, task, mapsurgery.param_groups(denoiser, lr=1e-2), 1e-2, 1, seed=0)
    assert len(losses) == 1 and torch.isfinite(torch.tensor(losses)).all()
    after = mapsurgery.adapter_state_dict(denoiser)
    assert any(not torch.equal(value, after[key]) for key, value in before.items())


@pytest.mark.parametrize("name", PIPELINES)
def test_denoiser_gets_what_the_pipeline_itself_gives_it(example, pipelines, name):
    """The same keywords as in the pipeline's own call, in the same shapes, and the same text for the same prompt."""
    model = example("diffusion_models").load_model(str(pipelines(name)), SIDE)
    seen: list[dict] = []
    hook = model.denoiser.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    scale = 3.5 if name == "flux" else 1.0  # above 1 the others would run each prompt twice
    model.pipe(["a dog"], height=SIDE, width=SIDE, num_inference_steps=1, guidance_scale=scale, output_type="latent")
    hook.remove()
    condition = model.encode_prompts(["a dog"])
    ours = model.inputs(torch.zeros(1, 4, SIDE // 2, SIDE // 2), torch.tensor([10]), condition)

    def flat(inputs):
        inputs = dict(inputs) | dict(inputs.get("added_cond_kwargs") or {})
        return {key: value for key, value in inputs.items() if isinstance(value, torch.Tensor)}

    theirs, ours = flat(seen[0]), flat(ours)
    constant = (
        "encoder_hidden_states",
        "text_embeds",
        "time_ids",
        "pooled_projections",
        "txt_ids",
        "img_ids",
        "guidance",
    )
    for key in constant:
        assert (key in theirs) == (key in ours), key
        if key in theirs:
            torch.testing.assert_close(
                ours[key].expand_as(theirs[key]), theirs[key], msg=lambda m, key=key: f"{key}: {m}"
            )
    assert ours.get("hidden_states", torch.empty(0)).shape == theirs.get("hidden_states", torch.empty(0)).shape


def test_flux_pictures_are_unpacked_as_they_were_packed(example, pipelines):
    model = example("diffusion_models").load_model(str(pipelines("flux")), SIDE)
    sample = torch.randn(2, 4, SIDE // 2, SIDE // 2)

    class Echo(nn.Module):
        config = model.denoiser.config

        def forward(self, hidden_states, **_):
            return (hidden_states,)

    noised = example("diffusion_loss").Noised(sample, torch.tensor([1, 2]), sample, torch.ones(2))
    model.pipe.register_modules(transformer=Echo())
    assert torch.equal(model.predict(noised, model.encode_prompts(["a", "b"])), sample)


def test_other_pipelines_and_resolutions_are_refused(example, pipelines, tmp_path):
    load = example("diffusion_models").load_model
    with pytest.raises(ValueError, match="resolution 30 is not a multiple of 4"):
        load(str(pipelines("sd")), 30)
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline"}))
    with pytest.raises(ValueError, match="is a WanPipeline; there are StableDiffusionPipeline"):
        load(str(tmp_path))


@pytest.fixture
def local_features(example, monkeypatch):
    """The script finds a small random network where it would download DINO."""
    module, script = example("image_features"), example("dreambooth")
    monkeypatch.setattr(
        script, "load_features", lambda name, device: module.load_features("test_vit", "none", 32, device)
    )


@pytest.mark.parametrize("name", [pytest.param("sdxl", marks=pytest.mark.long), "flux"])
@pytest.mark.usefixtures("local_features")
def test_script_runs_on_a_pipeline(example, pipelines, photos, tmp_path, capsys, name):
    options = [
        "--model", str(pipelines(name)), "--instance-images", str(photos), "--instance-prompt", "a sks dog",
        "--class-prompt", "a dog", "--class-count", "2", "--resolution", str(SIDE), "--steps", "2", "--rank", "2",
        "--images-per-prompt", "1", "--sampling-steps", "2", "--output", str(tmp_path), "--device", "cpu",
        "--gradient-checkpointing",
    ]  # fmt: skip
    assert example("dreambooth").main(options) == 0
    out = capsys.readouterr().out
    assert out.count("PROVED") == 2 and re.search(r"LoRA \(peft\) +-?\d", out)
    assert len(list((tmp_path / "class-images").glob("*.png"))) == 2
    assert (tmp_path / "grid.png").is_file() and (tmp_path / "map.safetensors").is_file()
    assert example("dreambooth").main([*options, "--no-lora"]) == 0
    assert "draws" not in capsys.readouterr().out, "images of the class are there already"


@pytest.mark.long
def test_half_precision_weights_train_and_prove(example, pipelines, photos, tmp_path, local_features, capsys):
    options = [
        "--model", str(pipelines("sd")), "--instance-images", str(photos), "--instance-prompt", "a sks dog",
        "--resolution", str(SIDE), "--steps", "2", "--images-per-prompt", "1", "--sampling-steps", "2",
        "--output", str(tmp_path), "--device", "cpu", "--amp", "bf16",
    ]  # fmt: skip
    assert example("dreambooth").main(options) == 0
    assert "bfloat16 autocast" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--targets", "*atn*"], "attn"),
        (["--instance-images", "nowhere"], "nowhere"),
        (["--test-images", "nowhere"], "nowhere"),
        (["--resolution", "30"], "30 is not a multiple"),
        (["--model", "nowhere/nothing"], "nowhere/nothing"),
        (["--lora-alpha", "4"], "--method map has no scaling"),
    ],
)
@pytest.mark.usefixtures("local_features")
def test_wrong_option_is_named_and_exits_with_2(example, pipelines, photos, tmp_path, capsys, options, message):
    fixed = ["--model", str(pipelines("sd")), "--instance-images", str(photos), "--instance-prompt", "a sks dog"]
    tiny = ["--resolution", str(SIDE), "--output", str(tmp_path), "--device", "cpu"]
    assert example("dreambooth").main([*fixed, *tiny, *options]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "some/model"], "needs --instance-images"),
        (["--model", "some/model", "--instance-images", "x"], "needs --instance-prompt"),
        (["--model", "packaged", "--test-images", "x"], "--test-images is for other models"),
        (["--steps", "0"], "0 is not a positive number"),
    ],
)
def test_impossible_option_exits_with_2(example, capsys, options, message):
    with pytest.raises(SystemExit) as exit_info:
        example("dreambooth").parse_args(options)
    assert exit_info.value.code == 2 and message in capsys.readouterr().err


# --- the tiny diffusion model -----------------------------------------------------------------------------------------


@pytest.fixture
def splits(example):
    """Twelve random images of each of the classes a, b and c to train on, and six to test on."""
    data = example("image_data")

    def samples(count):
        labels = torch.arange(3).repeat(count)
        return data.Samples(torch.randint(0, 255, (3 * count, 28, 28), generator=seeded()).byte(), labels)

    return data.ImageSplits(samples(12), samples(6), ["a", "b", "c"])


def test_prompts_are_words_of_the_table(example):
    tiny = example("tiny_diffusion")
    base = tiny.Base(tiny.Recipe(channels=(8, 16)), ["digit", "0", "1", "sks"])
    assert base.token_ids(["digit 1", "digit", "digit sks"]).tolist() == [[1, 3], [1, 0], [1, 4]]
    for prompt in ("digit 7", "", "digit 1 0"):
        with pytest.raises(ValueError, match=re.escape(f"{prompt!r}: write one or 2 of the words digit, 0, 1, sks")):
            base.token_ids([prompt])


def test_base_never_sees_the_subject_and_is_read_back_from_its_file(example, splits, tmp_path, monkeypatch):
    tiny = example("tiny_diffusion")
    recipe = tiny.Recipe(subject="b", steps=4, batch_size=8, channels=(8, 16))
    first = tiny.load_base(recipe, tmp_path, splits)
    untrained = tiny.Base(recipe, ["digit", "a", "b", "c", "sks"])
    changed = (first.words.weight != untrained.words.weight).any(dim=1)
    assert changed.tolist() == [True, True, True, False, True, False]  # "", digit, a, b, c, sks
    monkeypatch.setattr(tiny, "_train_base", lambda *_: pytest.fail("trained twice"))
    second = tiny.load_base(recipe, tmp_path, splits)
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )
    with pytest.raises(ValueError, match="remove the file to train anew"):
        tiny.load_base(tiny.Recipe(subject="b", steps=5, batch_size=8, channels=(8, 16)), tmp_path, splits)


def test_impossible_recipe_is_refused(example, splits, tmp_path):
    tiny = example("tiny_diffusion")
    with pytest.raises(ValueError, match="'cifar': there are mnist"):
        tiny.load_base(tiny.Recipe(data="cifar"), tmp_path, splits)
    with pytest.raises(ValueError, match="subject 'z': the classes of mnist are a, b, c"):
        tiny.load_base(tiny.Recipe(subject="z"), tmp_path, splits)


def test_encoding_loses_nothing_and_a_perfect_denoiser_draws_the_image(example, splits):
    """DDIM with the true v of one image must arrive at that image."""
    tiny = example("tiny_diffusion")
    model = tiny.TinyDiffusion(tiny.Base(tiny.Recipe(channels=(8, 16)), ["digit"]))
    images = tiny.images_of(splits.test)[:1]
    clean = model.encode_images(images)
    torch.testing.assert_close(F.pixel_shuffle(clean, tiny.PATCH) / 2 + 0.5, images)
    signal = model.scheduler.alphas_cumprod

    class Oracle(nn.Module):
        def forward(self, sample, timestep, **_):
            a = signal[timestep].reshape(-1, 1, 1, 1)
            noise = (sample - a.sqrt() * clean) / (1 - a).sqrt()
            return (a.sqrt() * noise - (1 - a).sqrt() * clean,)

    model.denoiser = Oracle()
    torch.testing.assert_close(
        model.generate(["digit"] * 2, seed=0, steps=20), images.expand(2, -1, -1, -1), atol=1e-3, rtol=0
    )


def test_same_seed_draws_and_trains_the_same(example, splits, tmp_path):
    tiny, dreambooth = example("tiny_diffusion"), example("dreambooth_task")
    base = tiny.load_base(tiny.Recipe(subject="b", steps=2, batch_size=8, channels=(8, 16)), tmp_path, splits)
    model = tiny.TinyDiffusion(base)
    images = tiny.images_of(splits.train)
    features = example("image_features").load_features("test_vit", "none", 32)
    task = dreambooth.Task(
        model, "digit sks", dreambooth.encode(model, images[:3], "digit sks"),
        dreambooth.encode(model, images[3:9], "digit"), features,
        {"digit sks": features(images[:5]), "digit a": features(images[5:9])}, ("*attn*",), images_per_prompt=2,
        sampling_steps=3,
    )  # fmt: skip

    def outcome(seed):
        torch.manual_seed(1)
        denoiser = mapsurgery.patch(task.build(), task.targets, rank=2)
        losses = dreambooth.train(denoiser, task, mapsurgery.param_groups(denoiser, lr=1e-2), 1e-2, 3, seed)
        return losses, dreambooth.score(denoiser, task, seed)

    first = outcome(0)
    assert outcome(0) == first != outcome(1)
    drawn = dreambooth.generate(task.build(), task, seed=0)
    assert {prompt: images.shape for prompt, images in drawn.items()} == {
        "digit sks": (8, 1, 16, 16),
        "digit a": (2, 1, 16, 16),
    }


# --- real images and weights ------------------------------------------------------------------------------------------


def skip_without(function, *arguments):
    """Load from an installed package, or skip with the loader's own words."""
    try:
        return function(*arguments)
    except importlib.import_module("packaged").MissingPackageError as error:
        pytest.skip(str(error))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("network", "size"),
    [pytest.param("vit_small_patch14_dinov2", 70, marks=pytest.mark.long), ("tf_efficientnet_lite0", 64)],
)
def test_real_images_of_the_subject_score_above_those_of_any_other_class(example, network, size):
    module = example("image_features")
    digits = skip_without(example("packaged").mnist)
    features = skip_without(module.load_features, network, "packaged", size)
    tiny, data = example("tiny_diffusion"), example("image_data")

    def images(label, rows):
        chosen = (digits.labels == label).nonzero()[rows, 0]
        return tiny.images_of(data.Samples(digits.pixels[chosen], digits.labels[chosen]))

    features.whiten(torch.cat([images(label, slice(100, 150)) for label in range(10)]))
    reference = features(images(5, slice(0, 32)))
    scores = [module.similarity(features(images(label, slice(32, 64))), reference) for label in range(10)]
    own = scores.pop(5)
    assert own > 0.1 and own > max(scores) + 0.05


@pytest.mark.slow
@pytest.mark.long
def test_script_moves_the_tiny_model_towards_its_subject(example, tmp_path, capsys):
    skip_without(example("packaged").mnist)
    skip_without(example("packaged").efficientnet_lite0)
    options = "--base-steps 400 --steps 150 --lr 1e-2 --class-count 32 --no-lora --threads 1 --device cpu"
    assert example("dreambooth").main([*options.split(), "--output", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert out.count("PROVED") == 2 and (tmp_path / "grid.png").is_file()
    found = dict(re.findall(r"^  (real images|base|MAP) +(-?[\d.]+)", out, re.M))
    subject = {name: float(value) for name, value in found.items()}
    # Direction only: so short a training moves the score by about 0.01.
    assert subject["base"] < subject["MAP"] < subject["real images"]
