"""How well pictures show people and follow prompts: the networks that judge, metrics, baselines, results in files."""
