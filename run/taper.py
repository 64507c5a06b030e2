"""Fades the norms of the Blocks out while a model trains: norm=tapernorm.

A pre-norm model needs its norms early in training. Later they can become fixed factors, if the
last norm stays (Kanavalau et al. 2026, arXiv 2602.10408). How much of a norm is left, its gate, is
a function of the step, so no checkpoint has to hold it. The factor that takes its place is fitted
once, when the gate begins to fall. From there on it is learned, as every parameter is.
"""

import torch
from torch import Tensor, nn

from data.loader import batch
from norm import Norm, at_least_fp32, fading_norms, gate_at, inverse_rms
from run.machine import autocast, to_device
from run.parallel import uncompiled
from run.setup import Run


def taper(run: Run) -> None:
    """Sets the gates for the next step, and before the first one in which they fall, the factors.
    A model without such norms stays as it is."""
    norms, start, end = fading_norms(run.model), run.config.taper_start, run.config.taper_end
    if norms and run.step == start:
        fit_factors(run, norms)
    for norm in norms:
        norm.gate.fill_(gate_at(run.step, start, end))


@torch.no_grad()
def fit_factors(run: Run, norms: list[Norm]) -> None:
    """Sets the log_scale of each norm so that its two branches differ least, in squares, over the
    batch of the next step.

    The branches are x gain / rms and f x gain, and so f = sum(|x gain|^2 / rms) / sum(|x gain|^2),
    over all tokens. The paper takes running averages of both sums; here they are of one batch.
    """
    config, ranks = run.config, run.ranks
    sums = {norm: torch.zeros(2, device=config.device) for norm in norms}

    def record(norm: nn.Module, inputs: tuple[Tensor]) -> None:
        x = at_least_fp32(inputs[0])
        squares = (x * norm.gain).square().sum(-1, keepdim=True)
        over_rms = squares * inverse_rms(x, norm.constants["eps"])
        sums[norm] += torch.stack((over_rms.sum(), squares.sum()))

    T, micro = config.model.block_size, config.micro_batch_size
    windows = batch(run.data, run.step, config.batch_size, T, config.seed, ranks.rank, ranks.size)
    hooks = [norm.register_forward_pre_hook(record) for norm in norms]
    run.model.eval()
    with uncompiled(run.model) as model, autocast(config.device, config.dtype):
        for part in zip(*(tensor.split(micro) for tensor in windows), strict=True):
            model(*(to_device(tensor, config.device) for tensor in part))
    for hook in hooks:
        hook.remove()
    for norm, of_norm in sums.items():
        over_rms, squares = ranks.mean_(of_norm)
        norm.log_scale.fill_((over_rms / squares).log())
