"""What `hdb preoptimize --init-from` saves: how fits are judged and compared."""

import torch

from lidb_peft import LiDBSpace
from testbed import miniature_lidb_config
from testbed.protocol import shown_subjects


def test_steps_for_the_same_loss_are_interpolated():
    import init_from

    plain = [torch.tensor([mean - 0.5, mean + 0.5]) for mean in (4.0, 3.0, 2.0)]
    predicted = [torch.tensor([mean - 0.5, mean + 0.5]) for mean in (3.5, 2.25, 1.5)]
    rows = init_from._rows([0, 10, 20], {"theta_0": plain, "prediction": predicted})
    assert [row["steps from theta_0 for the same"] for row in rows] == ["5", "18", "more than 20"]
    assert [(row["theta_0"], row["prediction"]) for row in rows] == [(4.0, 3.5), (3.0, 2.25), (2.0, 1.5)]
    assert rows[0]["gain ± standard error"] == "0.5000 ± 0.0000"


def test_all_fits_are_judged_at_the_same_noise_and_alone(base):
    import init_from

    space = LiDBSpace(base.adapted, miniature_lidb_config())
    subjects = shown_subjects(base, [0, 1])
    thetas = space.theta_0.expand(2, -1, -1).clone()
    first = init_from.photo_losses(base, space, subjects, thetas)
    thetas[1, :, -10:] += 0.3  # of the up half
    second = init_from.photo_losses(base, space, subjects, thetas)
    assert torch.equal(first[0], second[0])
    assert first[1] != second[1]
