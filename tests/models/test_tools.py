"""Other people's tools on these layers: docs/tools.md has a row for each, and a test here."""

from __future__ import annotations

import copy
import math
import re
from typing import Any

import pytest
import torch
from support.processes import ROOT
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel, update_bn
from torch.utils.flop_counter import FlopCounterMode

import tsbn_kernels
from tsbn_kernels import (
    FusedTSigmaBN1d,
    FusedTSigmaBN2d,
    MultiTaskModel,
    convert_model,
    export_task,
    fold_into_conv,
    hold_absent_tasks,
    parameter_groups,
    task_vector_names,
)
from tsbn_kernels.layers.batch_norm import FusedTSigmaBN

T, N, C = 3, 4, 5


def network() -> nn.Sequential:
    """A task-specific layer, a plain one, and one inside."""
    return nn.Sequential(FusedTSigmaBN2d(T, C), nn.BatchNorm2d(C), nn.Sequential(FusedTSigmaBN1d(T, C, bias=True)))


# ---- synchronised statistics ---------------------------------------------------------------------------------------


def test_pytorch_synchronises_task_specific_layers_and_plain_ones() -> None:
    model = network()
    before = copy.deepcopy(model)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert [type(layer) for layer in converted[:2]] == [FusedTSigmaBN2d, nn.SyncBatchNorm]
    assert converted[0] is model[0]
    assert converted[0].process_group == converted[2][0].process_group == "world"
    assert converted.state_dict().keys() == before.state_dict().keys()
    x = torch.randn(T * N, C, 3, 3)
    torch.testing.assert_close(converted[:2].eval()(x), before[:2].eval()(x))
    layer = FusedTSigmaBN2d(T, C)
    assert nn.SyncBatchNorm.convert_sync_batchnorm(layer) is layer


def test_importing_changes_no_other_conversion() -> None:
    class Other(nn.BatchNorm2d):
        pass

    class Synchronised(nn.SyncBatchNorm):
        pass

    for plain in (Other(C), nn.BatchNorm2d(C, affine=False), nn.BatchNorm3d(C, track_running_stats=False)):
        for conversion in (nn.SyncBatchNorm, Synchronised):
            converted: Any = conversion.convert_sync_batchnorm(plain, process_group="any")
            assert type(converted) is nn.SyncBatchNorm
            assert converted.process_group == "any"
            assert converted.weight is plain.weight
            assert converted.running_mean is plain.running_mean
    linear = nn.Linear(2, 2)
    assert nn.SyncBatchNorm.convert_sync_batchnorm(linear) is linear
    assert nn.SyncBatchNorm.convert_sync_batchnorm.__doc__.startswith("Converts all")


def test_a_layer_that_cannot_be_synchronised_says_so() -> None:
    with pytest.raises(ValueError, match="has recover_input=True, which does not work with a process_group"):
        nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(FusedTSigmaBN2d(T, C, recover_input=True)))


def convert_sync_batchnorm(module: Any, process_group: Any = None) -> Any:
    """As timm's, which has a loop of its own."""
    output = module
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        output = nn.SyncBatchNorm(
            module.num_features, module.eps, module.momentum, module.affine, module.track_running_stats, process_group
        )
        if module.affine:
            output.weight, output.bias = module.weight, module.bias
    for name, child in module.named_children():
        output.add_module(name, convert_sync_batchnorm(child, process_group))
    return output


@pytest.mark.parametrize("num_tasks", [1, T])
@pytest.mark.parametrize("whose", ["a user's", "timm's"])
def test_conversions_of_others_are_refused_with_the_remedy(whose: str, num_tasks: int) -> None:
    """Of one task the sizes would fit, and the sigmoid be lost in silence."""
    model = convert_model(nn.Sequential(nn.Conv2d(3, C, 1), nn.BatchNorm2d(C)), num_tasks, pretrained=False)
    timms = whose == "timm's"
    conversion = pytest.importorskip("timm.layers").convert_sync_batchnorm if timms else convert_sync_batchnorm
    with pytest.raises(TypeError, match=r"call torch.nn.SyncBatchNorm.convert_sync_batchnorm\(model\)"):
        conversion(model)
    assert type(model[1]) is FusedTSigmaBN2d
    assert model[1].affine


# ---- by the class --------------------------------------------------------------------------------------------------


def encoder() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, C, 3),
        nn.BatchNorm2d(C),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


def converted() -> Any:
    return convert_model(encoder(), T, pretrained=False)


def multitask() -> MultiTaskModel:
    return MultiTaskModel(converted(), {name: nn.Linear(C, 1) for name in "abc"})


def streams() -> torch.Tensor:
    return torch.randn(T * N, 3, 8, 8)


def layers_of(model: nn.Module) -> list[FusedTSigmaBN]:
    return [layer for layer in model.modules() if isinstance(layer, FusedTSigmaBN)]


def test_the_documented_way_to_freeze() -> None:
    model = multitask().train()
    for m in model.modules():
        if isinstance(m, _BatchNorm):
            m.eval().requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    sum(y.square().sum() for y in model(torch.randn(N, 3, 8, 8)).values()).backward()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    frozen = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert frozen == set(task_vector_names(model))


def test_timm_and_lightning_freeze() -> None:
    model = pytest.importorskip("timm.layers").freeze_batch_norm_2d(converted())
    assert [type(layer) for layer in (model[1], model[4])] == [FusedTSigmaBN2d] * 2
    freeze = pytest.importorskip("pytorch_lightning.callbacks").BaseFinetuning.freeze
    for train_bn in (True, False):
        freeze(model, train_bn=train_bn)
        assert {layer.weight.requires_grad for layer in layers_of(model)} == {train_bn}
        assert not model[0].weight.requires_grad


def test_statistics_are_averaged_for_each_task() -> None:
    model = converted()
    batches = [streams() for _ in range(3)]
    averaged = AveragedModel(model)
    update_bn(batches, averaged)
    expected = torch.stack([model[0](batch).unflatten(0, (T, N)).mean((1, 3, 4)) for batch in batches]).mean(0)
    torch.testing.assert_close(averaged.module[1].running_mean, expected, rtol=1e-4, atol=1e-5)


def test_precise_statistics_of_fvcore(monkeypatch: pytest.MonkeyPatch) -> None:
    precise = pytest.importorskip("fvcore.nn.precise_bn")
    model = nn.Sequential(FusedTSigmaBN2d(T, C))
    assert precise.get_bn_modules(model) == []
    monkeypatch.setattr(precise, "BN_MODULE_TYPES", (*precise.BN_MODULE_TYPES, FusedTSigmaBN))
    batches = [torch.randn(T * N, C, 3, 3) * 2 + 1 for _ in range(4)]
    precise.update_bn_stats(model, batches, len(batches))
    values = N * 9
    for t in range(T):
        plain = nn.Sequential(nn.BatchNorm2d(C))
        precise.update_bn_stats(plain, [batch.unflatten(0, (T, N))[t] for batch in batches], len(batches))
        torch.testing.assert_close(model[0].running_mean[t], plain[0].running_mean)
        ratio = model[0].running_var[t] / plain[0].running_var
        assert (ratio >= 1).all()
        assert (ratio <= 1 + 1 / (values - 1)).all()


def test_statistics_are_taken_away_by_torch_func() -> None:
    model = converted()
    torch.func.replace_all_batch_norm_modules_(model)
    x = streams()
    expected = model.train()(x)
    assert model[1].running_mean is None
    assert torch.equal(model.eval()(x), expected)


def test_timm_and_lightning_average_weights() -> None:
    model = multitask()
    timm = pytest.importorskip("timm.utils")
    average = timm.ModelEmaV3(model, decay=0.5)
    before = copy.deepcopy(model.backbone[1].weight.detach())
    nn.init.normal_(model.backbone[1].weight)
    average.update(model)
    expected = (before + model.backbone[1].weight.detach()) / 2
    torch.testing.assert_close(average.module.backbone[1].weight.detach(), expected)


def test_a_run_of_lightning(tmp_path: Any) -> None:
    """Its optimiser has a closure; its averaging looks for ``_BatchNorm``; its synchronisation is PyTorch's."""
    lightning = pytest.importorskip("pytorch_lightning")

    class Module(lightning.LightningModule):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = multitask()

        def training_step(self, x: torch.Tensor, _: int) -> torch.Tensor:
            return sum(y.square().sum() for y in self.net(x, tasks=["a", "c"]).values())  # type: ignore[return-value]

        def configure_optimizers(self) -> torch.optim.Optimizer:
            optimizer = torch.optim.AdamW(parameter_groups(self.net, 1e-3, weight_decay=0.1))
            hold_absent_tasks(optimizer, self.net)
            return optimizer

        def train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader([torch.randn(3, 8, 8) for _ in range(2 * N)], batch_size=N)

    module = Module()
    before = module.net.backbone[1].weight.detach().clone()
    averaging = lightning.callbacks.StochasticWeightAveraging(swa_lrs=1e-3, swa_epoch_start=1)
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    lightning.Trainer(max_epochs=2, callbacks=[averaging], default_root_dir=tmp_path, **options).fit(module)
    after = module.net.backbone[1].weight.detach()
    assert (after != before).any(1).tolist() == [True, False, True]
    layer_sync = pytest.importorskip("pytorch_lightning.plugins.layer_sync").TorchSyncBatchNorm()
    assert {layer.process_group for layer in layers_of(layer_sync.apply(module.net))} == {"world"}


# ---- by the operators ----------------------------------------------------------------------------------------------


def test_operations_counted_by_pytorch() -> None:
    counts = []
    for model in (converted(), encoder()):
        with FlopCounterMode(display=False) as counter:
            model(streams())
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def normalised() -> int:
    """Values that the layers of the encoder normalise."""
    return T * N * (4 * 36 + C * 16)


def test_operations_counted_by_thop() -> None:
    thop = pytest.importorskip("thop")
    hooks = pytest.importorskip("thop.vision.basic_hooks")
    options = {"verbose": False}
    without, _ = thop.profile(converted(), (streams(),), **options)
    known, _ = thop.profile(
        converted(), (streams(),), custom_ops={FusedTSigmaBN2d: hooks.count_normalization}, **options
    )
    plain, _ = thop.profile(encoder(), (streams(),), **options)
    assert known == plain == without + 4 * normalised()


def test_operations_counted_by_ptflops() -> None:
    ptflops = pytest.importorskip("ptflops")
    hook = pytest.importorskip("ptflops.pytorch_ops").bn_flops_counter_hook

    def count(model: nn.Module, backend: str, **options: Any) -> int:
        macs: int = ptflops.get_model_complexity_info(
            model,
            (3, 8, 8),
            as_strings=False,
            print_per_layer_stat=False,
            backend=backend,
            input_constructor=lambda _: streams(),
            **options,
        )[0]
        return macs

    known = count(converted(), "pytorch", custom_modules_hooks={FusedTSigmaBN2d: hook})
    assert known == count(converted(), "pytorch") + 2 * normalised() // (T * N)  # it divides by the batch
    assert count(converted(), "aten") == count(encoder(), "aten")


def test_operations_counted_by_fvcore() -> None:
    fvcore = pytest.importorskip("fvcore.nn")
    get_shape = pytest.importorskip("fvcore.nn.jit_handles").get_shape
    analysis = fvcore.FlopCountAnalysis(converted().eval(), (streams(),)).unsupported_ops_warnings(False)
    without, operator = analysis.total(), "prim::PythonOp.EagerTaskBatchNorm"
    assert analysis.unsupported_ops() == {operator: 2}
    analysis.set_op_handle(operator, lambda inputs, outputs: 5 * math.prod(get_shape(inputs[0])))
    assert analysis.total() == without + 5 * normalised()


def test_parameters_counted_by_torchinfo() -> None:
    torchinfo = pytest.importorskip("torchinfo")
    model = multitask()
    summary = torchinfo.summary(model, input_data=torch.randn(N, 3, 8, 8), verbose=0)
    assert summary.total_params == sum(parameter.numel() for parameter in model.parameters())


# ---- by the shapes of parameters -----------------------------------------------------------------------------------


def test_timm_does_not_decay_what_is_named() -> None:
    groups = pytest.importorskip("timm.optim").param_groups_weight_decay
    model = multitask()
    plain, decayed = groups(model, 0.05, no_weight_decay_list=task_vector_names(model))
    gates = {layer.weight for layer in layers_of(model)}
    assert gates <= set(plain["params"])
    assert not gates & set(decayed["params"])
    assert gates <= set(groups(model, 0.05)[1]["params"])  # what the table says of it by itself


def test_an_optimiser_of_matrices_gets_the_others() -> None:
    model = multitask()
    names = set(task_vector_names(model))
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and name not in names]
    assert {id(p) for p in matrices} == {id(head.weight) for head in model.heads.values()}
    torch.optim.Muon(matrices)


def test_what_folds_one_layer_refuses_those_of_tasks() -> None:
    for num_tasks in (1, T):
        model: Any = convert_model(encoder(), num_tasks, pretrained=False).eval()
        x = torch.randn(num_tasks * N, 3, 8, 8)
        with pytest.raises(Exception, match="did not find fuser method"):
            torch.ao.quantization.fuse_modules(model, [["0", "1"]])
        with pytest.raises(RuntimeError, match="size"):
            torch.nn.utils.fusion.fuse_conv_bn_eval(model[0], model[1])(x)
        stream = x.unflatten(0, (num_tasks, N))[-1]
        expected = model(x).unflatten(0, (num_tasks, N))[-1]
        torch.testing.assert_close(export_task(model, num_tasks - 1)(stream), expected, rtol=1e-4, atol=1e-5)
        folded = fold_into_conv(model[0], model[1], task=num_tasks - 1)
        torch.testing.assert_close(folded(stream).relu(), model[:2](x)[-N:], rtol=1e-4, atol=1e-5)


def test_dynamic_quantisation_leaves_them_in_float() -> None:
    model = nn.Sequential(converted(), nn.Linear(C, 2)).eval()
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    x = streams()
    assert type(quantised[1]) is not nn.Linear
    assert torch.equal(quantised[0](x), model[0](x))


# ---- the table -----------------------------------------------------------------------------------------------------


def test_the_table_names_what_there_is() -> None:
    text = (ROOT / "docs" / "tools.md").read_text()
    others = {"param_groups_weight_decay", "OneCycleLR", "FlopCountAnalysis"}
    called = set(re.findall(r"(\w+)\((?:model|optimizer|conv)\b", text)) - others
    assert called <= set(tsbn_kernels.__all__)
    assert {"hold_absent_tasks", "split_parameters", "expand_state_dict", "export_task"} <= called
