"""The figures of the GPU benchmark as tables for `docs/gpu.md`."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from neo_megatron.benchmarks.gpu_steps import FP8, ON_GPU, OURS, PLAIN, runs
from neo_megatron.benchmarks.gpu_timing import CAUSAL, PACKED
from neo_megatron.planning.hardware import GPUS

NOT_RUN = "not run: no GPU"


def markdown(results: dict[str, Any]) -> str:
    """Machine, ceilings, steps, kernels, profile and targets; targets last."""
    ceilings, steps, attention = results["ceilings"], results["steps"], results["attention"]
    machine = ", ".join(f"{name} {value}" for name, value in results["machine"].items())
    on = ceilings.get("name", "CPU, tiny model, float32: these rows only show that the command works")
    parts = [f"{on}; {machine}; {results['seconds']} s in all.", _ceilings(ceilings, results["on_gpu"])]
    if steps:
        parts.append(_steps(steps, ceilings, results["on_gpu"]))
    if attention:
        parts.append(_attention(attention, ceilings, results["on_gpu"]))
    if steps:
        parts += [_profiles(steps, results["on_gpu"]), _targets(steps, ceilings, results["on_gpu"])]
    return "\n\n".join(parts)


def _ceilings(ceilings: dict[str, Any], on_gpu: bool) -> str:
    if "product" not in ceilings:
        return f"Ceilings: {ceilings.get('failed')}"
    side, copied = ceilings["side"], ceilings["copy"]
    rows = [
        (f"product of {side} x {side} matrices", f"{_tera(ceilings['product'])} TFLOP/s"),
        ("copy on the device, read and written", f"{copied / 1e12:.2f} TB/s" if on_gpu else f"{copied / 1e9:.1f} GB/s"),
    ]
    return _table(("ceiling", "measured"), rows)


def _steps(steps: Sequence[dict[str, Any]], ceilings: dict[str, Any], on_gpu: bool) -> str:
    header = (
        "step",
        "pack",
        "tokens/s",
        "TFLOP/s",
        "of the product",
        "of the datasheet",
        "peak GB",
        "recomputed layers",
    )
    rows = []
    for step in steps:
        what = _what(step)
        if "failed" in step:
            rows.append((what, step["length"], step["failed"], *[""] * 5))
            continue
        rate, datasheet = step["flops"] / step["seconds"], _datasheet(ceilings)
        rows.append(
            (
                what,
                f"{step['length']:,}",
                f"{step['tokens'] / step['seconds']:,.0f}",
                _tera(rate),
                f"{rate / ceilings['product']:.1%}" if "product" in ceilings else "",
                f"{rate / datasheet:.1%}" if datasheet else "",
                f"{step['peak_bytes'] / 1e9:.1f}" if step["peak_bytes"] else "",
                step["recomputed"] or "",
            )
        )
    if not on_gpu:
        rows += [(_what(asdict(run)), f"{run.length:,}", NOT_RUN, *[""] * 5) for run in runs(ON_GPU)]
    return _table(header, rows)


def _what(step: dict[str, Any]) -> str:
    return f"{step['who']}, {step['precision']}, stage {step['training_stage']}"


def _attention(kernels: Sequence[dict[str, Any]], ceilings: dict[str, Any], on_gpu: bool) -> str:
    header = (
        "attention kernel",
        "mask",
        "pack",
        "forward",
        "backward",
        "both, TFLOP/s",
        "of the product",
        "mask built",
    )
    rows = []
    for kernel in kernels:
        if "failed" in kernel:
            rows.append((kernel["failed"], *[""] * 7))
            continue
        what = (kernel["kernel"], kernel["mask"], f"{kernel['length']:,}")
        if "refused" in kernel:
            rows.append((*what, f"does not run: {kernel['refused']}", *[""] * 4))
            continue
        rates = [_tera(kernel[key]) for key in ("rate_forward", "rate_backward", "rate")]
        share = f"{kernel['rate'] / ceilings['product']:.1%}" if "product" in ceilings else ""
        built = f"built in {1e3 * kernel['mask_seconds']:.2f} ms" if "mask_seconds" in kernel else ""
        if "pairs_computed" in kernel:
            built += f", {kernel['pairs_computed']:.2f} pairs computed for each allowed"
        rows.append((*what, *rates, share, built))
    if not on_gpu:
        ours = [(f"ours, --attention-backend {name}", mask) for mask in (PACKED, CAUSAL) for name in ("auto", "flash")]
        for length in ON_GPU.lengths:
            rows += [(*row, f"{length:,}", NOT_RUN, *[""] * 4) for row in (*ours, ("library kernels", CAUSAL))]
    return _table(header, rows)


def _profiles(steps: Sequence[dict[str, Any]], on_gpu: bool) -> str:
    profiled = [step for step in steps if step.get("kinds")]
    if not profiled:
        return _table(("where the time goes", ""), [("kernels by kind", NOT_RUN if not on_gpu else "no profile")])
    header = ("where the time goes", *[f"{step['precision']}, {step['length']:,}" for step in profiled])
    kinds = list(dict.fromkeys(kind for step in profiled for kind in step["kinds"]))
    rows = [(kind, *[f"{step['kinds'].get(kind, 0.0):.1%}" for step in profiled]) for kind in kinds]
    rows.append(("waits of the host in a step", *[f"{step['waits']:g}" for step in profiled]))
    return _table(header, rows)


def _targets(steps: Sequence[dict[str, Any]], ceilings: dict[str, Any], on_gpu: bool) -> str:
    """Targets for one H100 and the measured figures, at each pack length."""
    rows = []
    for length in dict.fromkeys(step["length"] for step in steps) if on_gpu else ON_GPU.lengths:
        found = {
            (step["who"], step["precision"], step["training_stage"]): step
            for step in steps
            if step["length"] == length and "failed" not in step
        }

        def speed(*key: Any, found: dict = found) -> float | None:
            return found[key]["tokens"] / found[key]["seconds"] if key in found else None

        every = found.get((OURS, "bf16", 2), {})
        mfu = every["flops"] / every["seconds"] / ceilings["product"] if every and "product" in ceilings else None
        recipes = [rate for recipe in FP8 if (rate := speed(OURS, recipe, 2))]
        bf16, stage_one, plain = speed(OURS, "bf16", 2), speed(OURS, "bf16", 1), speed(PLAIN, "bf16", 2)
        idle = (every.get("kinds") or {}).get("idle")
        rows += [
            _target("stage 2, bf16: MFU of the measured product", length, mfu, 0.5, "{:.1%}"),
            _target("fastest FP8 recipe over bf16", length, _ratio(max(recipes, default=None), bf16), 1.3),
            _target("over the exported model in plain PyTorch", length, _ratio(bf16, plain), 2.0),
            _target("stage 1 over stage 2, tokens/s", length, _ratio(stage_one, bf16), 1.3),
            _target("idle", length, idle, 0.03, "{:.1%}", at_most=True),
        ]
    if not on_gpu:
        rows = [(*row[:2], NOT_RUN, row[3], "") for row in rows]
    return _table(("target on one H100", "pack", "measured", "target", "reached"), rows)


def _target(
    what: str, length: int, value: float | None, target: float, form: str = "{:.2f}", at_most: bool = False
) -> tuple[str, ...]:
    sign = "at most " if at_most else "at least "
    if value is None:
        return what, f"{length:,}", "not run", sign + form.format(target), ""
    reached = value <= target if at_most else value >= target
    return what, f"{length:,}", form.format(value), sign + form.format(target), "yes" if reached else "no"


def _ratio(ours: float | None, other: float | None) -> float | None:
    return ours / other if ours and other else None


def _datasheet(ceilings: dict[str, Any]) -> float | None:
    """The maker's dense bf16 rate of this GPU."""
    name = ceilings.get("name", "").lower()
    return next((gpu.bf16 for gpu in GPUS.values() if gpu.name in name), None)


def _tera(rate: float) -> str:
    return f"{rate / 1e12:.3g}"


def _table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in (header, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(header), *lines[1:]])
