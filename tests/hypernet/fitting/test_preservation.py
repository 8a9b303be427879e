from dataclasses import replace

import pytest
import torch

from hypernet.fitting.engine import fit_lora, fit_theta
from hypernet.fitting.preservation import PromptPreservation
from hypernet.recipe import FitConfig

TEMPLATES = ("a pencil drawing of {}", "{} at night", "a cartoon of {}")
CONFIG = FitConfig(steps=2, lr=1e-3, timesteps_per_step=3, preservation=1.0, preserved=TEMPLATES, max_grad_norm=1e9)


def generators(count):
    return [torch.Generator().manual_seed(i) for i in range(count)]


def test_what_is_preserved_is_the_base_s_own_change(base):
    noisy, timesteps = torch.randn(6, 4, 8, 8, generator=generators(1)[0]), torch.tensor([10, 500, 900] * 2)
    preservation = PromptPreservation(base, ["a sks face", "a zwx man"], ["a face", "a man"], TEMPLATES)
    drawn = preservation.preserve(noisy, timesteps, preservation.choose(3, generators(2)))
    assert drawn.rows.shape == (4,)  # two of each subject's three
    assert sorted(row // 3 for row in drawn.rows.tolist()) == [0, 0, 1, 1]
    texts = [base.tokenizer.decode(ids, skip_special_tokens=True) for ids in drawn.prompts.token_ids[:, 0]]
    assert all("sks face" in text for text in texts[:2])
    assert all("zwx man" in text for text in texts[2:])
    with torch.no_grad():
        for row, text, change in zip(drawn.rows, texts, drawn.change, strict=True):
            subject, plain = ("sks face", "face") if row < 3 else ("zwx man", "man")
            answers = [
                base.denoise(noisy[row, None], timesteps[row, None], base.encode_prompts(prompts))
                for prompts in map(base.prepare_prompts, ([f"a {plain}"], [text.replace(subject, plain)]))
            ]
            torch.testing.assert_close(change, (answers[1] - answers[0])[0], atol=1e-4, rtol=1e-4)


def test_the_base_itself_preserves_everything(base, space, new_subject):
    subject = replace(new_subject("ann"), class_prompt="a sks face")
    shown = []
    for weight in (0.0, 100.0):
        theta, _ = fit_theta(base, space, [subject], replace(CONFIG, steps=1, preservation=weight, lr=1e-2))
        shown.append(theta)
    # At theta_0 the change is the base's own: the first gradient, and so Adam's first step, is that of denoising alone.
    moved = (shown[0] - space.theta_0).abs() > 5e-3
    assert torch.equal(torch.sign(shown[0] - space.theta_0)[moved], torch.sign(shown[1] - space.theta_0)[moved])


def test_nobody_s_fit_depends_on_who_shares_the_batch(base, space, new_subject, random_theta):
    subjects = [replace(new_subject(key, 2), class_prompt="a face") for key in ("ann", "bob")]
    together, losses = fit_theta(base, space, subjects, CONFIG, start=random_theta)
    for i, subject in enumerate(subjects):
        alone, alone_losses = fit_theta(base, space, [subject], CONFIG, start=random_theta)
        torch.testing.assert_close(losses[0, i], alone_losses[0, 0], rtol=1e-5, atol=0)
        assert (together[i] - alone[0]).norm() < 0.02 * (alone[0] - random_theta).norm()


def test_a_prompt_keeps_its_effect(base, space, new_subject):
    subject = replace(new_subject("ann"), class_prompt="a face")
    config = replace(CONFIG, steps=25, lr=8e-3, timesteps_per_step=4, preserved=TEMPLATES[:1])
    noisy = torch.randn(8, 4, 8, 8, generator=generators(1)[0])
    timesteps = torch.linspace(300, 990, 8).long()

    @torch.no_grad()
    def change(prompt, styled):
        embeds = [base.encode_prompts(base.prepare_prompts([text] * 8)) for text in (prompt, styled)]
        return base.denoise(noisy, timesteps, embeds[1]) - base.denoise(noisy, timesteps, embeds[0])

    expected = change("a face", "a pencil drawing of a face")
    lost = {}
    for weight in (0.0, 1.0):
        (factors,), _ = fit_lora(base, space, [subject], replace(config, preservation=weight), rank=4)
        with space.apply(factors):
            lost[weight] = (change("a sks face", "a pencil drawing of a sks face") - expected).norm()
    assert lost[1.0] < 0.9 * lost[0.0]


def test_a_subject_without_a_class_prompt_is_refused(base, space, new_subject):
    with pytest.raises(ValueError, match="'ann' has no class_prompt"):
        fit_theta(base, space, [new_subject("ann")], CONFIG)
