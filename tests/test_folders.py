import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from helpers_diffusers import text_inputs, text_unet

from dmdkit import (
    DiffusionGANHead,
    DiscreteVariancePreserving,
    EpsilonPrediction,
    KarrasPreconditioning,
    NoiseProcess,
    Parameterization,
    RectifiedFlow,
    ScoreEstimator,
    VarianceExploding,
    VelocityPrediction,
    VPrediction,
    trainable_copy,
)
from dmdkit.adapters.diffusers import UNetNetwork
from dmdkit.adapters.folders import (
    SIDECAR,
    load_denoiser,
    read_sidecar,
    require_replaceable,
    save_denoiser,
)

VALUES: list[tuple[NoiseProcess, Parameterization, float]] = [
    (VarianceExploding(), KarrasPreconditioning(0.25), 3.0),
    (DiscreteVariancePreserving((0.9, 0.5, 0.1)), EpsilonPrediction(), 1.0),
    (DiscreteVariancePreserving((0.9, 0.5, 0.0)), VPrediction(time_scale=2), 2.0),
    (RectifiedFlow(), VelocityPrediction(time_scale=1000), 0.5),
]


def denoiser(
    process: NoiseProcess = VALUES[0][0],
    parameterization: Parameterization = VALUES[0][1],
) -> ScoreEstimator:
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    return ScoreEstimator(UNetNetwork(unet), process, parameterization)


@pytest.mark.parametrize(("process", "parameterization", "time"), VALUES)
def test_a_denoiser_comes_back_the_same(
    tmp_path: Path,
    process: NoiseProcess,
    parameterization: Parameterization,
    time: float,
) -> None:
    estimator = denoiser(process, parameterization)
    save_denoiser(tmp_path / "d", estimator, times=(time,), about={"seed": 3})
    loaded = load_denoiser(tmp_path / "d")
    assert loaded.process == process
    assert loaded.parameterization == parameterization
    x_t, t = torch.randn(2, 1, 8, 8), torch.full((2,), time)
    assert torch.equal(loaded(x_t, t), estimator(x_t, t))
    sidecar = read_sidecar(tmp_path / "d")
    assert sidecar.times == (time,)
    assert sidecar.about == {"seed": 3}


def test_the_folder_is_an_ordinary_one_of_diffusers(tmp_path: Path) -> None:
    estimator = denoiser()
    save_denoiser(tmp_path / "d", estimator)
    unet: Any = UNet2DModel.from_pretrained(tmp_path / "d")
    network = estimator.network
    assert isinstance(network, UNetNetwork)
    for name, value in network.unet.state_dict().items():
        assert torch.equal(unet.state_dict()[name], value)
    assert read_sidecar(tmp_path / "d").times is None


def test_a_unet_with_text_comes_back_as_one(tmp_path: Path) -> None:
    """The class is that of `config.json`; without it the weights would not fit."""
    estimator = ScoreEstimator(
        UNetNetwork(text_unet("as SD1.5")),
        DiscreteVariancePreserving.scaled_linear(),
        VPrediction(),
    )
    save_denoiser(tmp_path / "d", estimator, times=(999.0,))
    loaded = load_denoiser(tmp_path / "d")
    x, t, cond = text_inputs("as SD1.5")
    assert torch.equal(loaded(x, t, cond), estimator(x, t, cond))


@pytest.mark.parametrize("config", ['{"_class_name": "FluxTransformer2DModel"}', "{}"])
def test_another_model_is_refused(tmp_path: Path, config: str) -> None:
    save_denoiser(tmp_path / "d", denoiser())
    (tmp_path / "d" / "config.json").write_text(config)
    with pytest.raises(ValueError, match="expected a _class_name of UNet2DModel or"):
        load_denoiser(tmp_path / "d")
    (tmp_path / "d" / "config.json").unlink()
    with pytest.raises(ValueError, match=r"there is no config\.json"):
        load_denoiser(tmp_path / "d")


def test_only_a_denoiser_is_replaced(tmp_path: Path) -> None:
    save_denoiser(tmp_path / "d", denoiser(), about={"version": 1})
    save_denoiser(tmp_path / "d", denoiser(), about={"version": 2})
    assert read_sidecar(tmp_path / "d").about == {"version": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["d"]
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("all of it")
    with pytest.raises(ValueError, match=r"holds thesis\.tex, which is no part"):
        save_denoiser(tmp_path / "home", denoiser())
    assert (tmp_path / "home" / "thesis.tex").read_text() == "all of it"
    with pytest.raises(ValueError, match="is a file"):
        require_replaceable(tmp_path / "home" / "thesis.tex")
    (tmp_path / "d" / "notes.txt").write_text("precious")
    with pytest.raises(ValueError, match=r"holds notes\.txt, which is no part"):
        save_denoiser(tmp_path / "d", denoiser())
    assert (tmp_path / "d" / "notes.txt").read_text() == "precious"
    (tmp_path / "empty").mkdir()
    require_replaceable(tmp_path / "empty")
    require_replaceable(tmp_path / "not yet")


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    head = DiffusionGANHead(channels=16, resolution=4, groups=4)
    with pytest.raises(TypeError, match="expected a UNetNetwork; take it out"):
        save_denoiser(tmp_path / "d", trainable_copy(denoiser(), head=head))
    assert not (tmp_path / "d").exists()


def edit(folder: Path, **changes: Any) -> None:
    file = folder / SIDECAR
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"process": {"type": "os.system"}}, r"type 'os\.system', expected one of"),
        ({"process": {"type": "RectifiedFlow", "evil": 1}}, "is not understood"),
        ({"parameterization": {}}, "is not understood"),
        ({"times": 80}, "is not understood"),
        ({"times": ["late"]}, "is not understood"),
    ],
)
def test_a_sidecar_that_is_not_understood_is_named(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    save_denoiser(tmp_path / "d", denoiser())
    edit(tmp_path / "d", **change)
    with pytest.raises(ValueError, match=message) as error:
        load_denoiser(tmp_path / "d")
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"there is no {SIDECAR}"):
        load_denoiser(tmp_path)
    save_denoiser(tmp_path / "d", denoiser())
    (tmp_path / "d" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ValueError, match="holds no UNet") as error:
        load_denoiser(tmp_path / "d")
    assert "\n" not in str(error.value)
