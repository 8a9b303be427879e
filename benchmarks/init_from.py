"""What does starting targets at a prediction save? ``python benchmarks/init_from.py --hypernet DIR``

Targets of the miniature's validation people, fitted from theta_0 and from a hypernetwork's predictions, as ``hdb
preoptimize`` does without and with ``--hypernet``. The hypernetwork has frozen bases, because targets require them.
Each number of steps is a separate fit, whose learning rate decays until its end. Fits are judged by the denoising loss
on the fitted photo, with the same noise for all fits, which none of them has seen.

Predicted: a prediction saves most of a short fit and less of longer ones, as in finetuning.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from costs import new_parser, report
from scoring import equal_steps
from torch import Tensor

from hypernet.base_models.base import BaseModel
from hypernet.base_models.loading import load_base
from hypernet.fitting.engine import Subject, fit_theta
from hypernet.fitting.losses import base_losses
from hypernet.fitting.noise import draw_noise, noise_photos
from hypernet.network.hypernetwork import read_config
from hypernet.network.prediction import predicted_start
from hypernet.recipe import TARGET_STEPS
from lidb_peft import LiDBSpace
from testbed import MINIATURE_RECIPE, miniature_path
from testbed.portraits import SPLITS
from testbed.protocol import shown_photos, shown_subjects

COPIES = 32  # noisy copies of each photo, to judge a fit
JUDGED_SEED = 0x5EED  # of the judging noise; the noise of a fit is derived from its key


@torch.no_grad()
def photo_losses(base: BaseModel, space: LiDBSpace, subjects: Sequence[Subject], thetas: Tensor) -> Tensor:
    """The denoising loss on each subject's photo, ``(N,)``, with thetas ``(N, L, row)``."""
    losses = []
    for number, (subject, theta) in enumerate(zip(subjects, thetas, strict=True)):
        moments = subject.moments.expand(COPIES, -1, -1, -1)
        noise = draw_noise(base, moments.shape, [torch.Generator().manual_seed(JUDGED_SEED + number)])
        noisy_latents, target = noise_photos(base, moments, noise)
        prompts, background = base.prepare_prompts([subject.prompt]), MINIATURE_RECIPE.background
        with space.apply(space.expand(theta[None])):
            loss, _ = base_losses(base, prompts, noisy_latents, noise.timesteps, target, background, None)
        losses.append(loss)
    return torch.cat(losses)


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--hypernet", type=Path, required=True, metavar="DIR", help="with frozen bases")
    parser.add_argument("--people", type=int, default=16)
    parser.add_argument("--steps", type=int, nargs="+", default=[0, 12, 25, 50, TARGET_STEPS, 2 * TARGET_STEPS])
    parser.add_argument("--lr", type=float, default=MINIATURE_RECIPE.theta_lr)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    base = load_base(str(miniature_path()), arguments.device, arguments.precision)
    people = SPLITS["validation"][: arguments.people]
    subjects = shown_subjects(base, people)
    space, predict, _ = predicted_start(read_config(arguments.hypernet), base.adapted, base.device)
    starts = {"theta_0": space.theta_0.expand(len(people), -1, -1), "prediction": predict(shown_photos(people))}
    recipe = replace(MINIATURE_RECIPE, theta_lr=arguments.lr)
    losses = {name: [] for name in starts}
    for steps in arguments.steps:
        for name, start in starts.items():
            fit = replace(recipe, theta_steps=steps).theta_fit
            theta = fit_theta(base, space, subjects, fit, start)[0] if steps else start
            losses[name].append(photo_losses(base, space, subjects, theta))
            print(f"{steps} steps from {name}: {losses[name][-1].mean():.4f}", flush=True)
    report(arguments, {"Denoising loss of the fitted photo, by where the fit starts": _rows(arguments.steps, losses)})


def _rows(all_steps: Sequence[int], losses: dict[str, list[Tensor]]) -> list[dict]:
    plain = [-float(values.mean()) for values in losses["theta_0"]]
    rows = []
    for steps, without, predicted in zip(all_steps, *losses.values(), strict=True):
        gain, reached = without - predicted, float(predicted.mean())
        rows.append({
            "steps": steps, "theta_0": float(without.mean()), "prediction": reached,
            "gain ± standard error": f"{gain.mean():.4f} ± {gain.std() / len(gain) ** 0.5:.4f}",
            "steps from theta_0 for the same": equal_steps(-reached, plain, all_steps),
        })  # fmt: skip
    return rows


if __name__ == "__main__":
    main()
