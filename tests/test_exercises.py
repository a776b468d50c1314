"""The checks of the coding exercises, tried on what the notebooks hold: solutions pass, mistakes get their sentences.

A solution is the last folded Python block under its exercise, so the text that a reader unfolds is the one that is
tested. A mistake is an edit of a solution (what to replace, by what), with words of the sentence that the check says.
"""

from __future__ import annotations

import ast
import re
import textwrap
from pathlib import Path

import jupytext
import pytest

import dbnb.exercises

SCRIPTS = sorted((Path(__file__).parent.parent / "notebooks" / "src").glob("*.py"))
CALL = re.compile(r"^(check_(\d\d)[a-z])\((\w+)\)$", re.M)


def _exercises() -> dict[str, tuple[str, str, str, str]]:
    """Check -> the name that it is called with, the stub's cell, the cell of hints and solution, all imports before."""
    found = {}
    for script in SCRIPTS:
        imports: list[str] = []
        cells = jupytext.read(script).cells
        for cell, following in zip(cells, [*cells[1:], None], strict=True):
            if cell.cell_type != "code" or "nbval-skip" in cell.metadata.get("tags", []):
                continue
            tree = ast.parse(cell.source)
            imports += [ast.unparse(node) for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
            if call := CALL.search(cell.source):
                found[call[1]] = (call[3], cell.source, following.source, "\n".join(imports))
    return found


EXERCISES = _exercises()
by_check = pytest.mark.parametrize("check", sorted(EXERCISES))


def solution(check: str) -> str:
    """The folded solution's code."""
    folded = EXERCISES[check][2].split("<details><summary>Solution</summary>")[1]
    return re.search(r"```python\n(.*?)```", folded, re.S)[1]


def said(check: str, code: str, capsys) -> str:
    """What the check prints about this code's function."""
    name, _, _, imports = EXERCISES[check]
    names: dict = {}
    exec(imports, names)
    exec(code, names)
    capsys.readouterr()
    getattr(dbnb.exercises, check)(names[name])
    return capsys.readouterr().out.strip()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_every_notebook_has_two_exercises_or_more(script):
    mine = [check for check in EXERCISES if check.startswith(f"check_{script.name[:2]}")]
    assert len(mine) >= 2 and mine == [f"check_{script.name[:2]}{letter}" for letter in "abcdef"[: len(mine)]]


def test_every_check_is_called_in_its_notebook():
    assert set(EXERCISES) == {name for name in dbnb.exercises.__all__ if name.startswith("check_")}


@by_check
def test_an_exercise_has_a_time_a_short_stub_hints_and_a_solution_last(check):
    name, stub, folded, _ = EXERCISES[check]
    source = next(script for script in SCRIPTS if script.name.startswith(check[6:8])).read_text(encoding="utf-8")
    heading = source[: source.index(f"\n{check}(")].rsplit("\n# ### ", 1)[1].splitlines()[0]
    assert re.fullmatch(rf"Exercise {check[-1].upper()}: .+ \(\d+ minutes\)", heading)
    definition = next(node for node in ast.parse(stub).body if getattr(node, "name", "") == name)
    assert ast.get_docstring(definition) and "..." in ast.unparse(definition)
    summaries = re.findall(r"<summary>(.*?)</summary>", folded.split("\n### ")[0])
    assert summaries == [*(f"Hint {number}" for number in range(1, len(summaries))), "Solution"]
    assert len(summaries) >= 2


@by_check
def test_the_stub_is_told_that_it_is_not_written(check, capsys):
    assert said(check, EXERCISES[check][1], capsys).startswith("Not written yet: ")


@by_check
def test_the_folded_solution_is_right(check, capsys):
    assert said(check, solution(check), capsys).startswith("Right: ")


MISTAKES = {
    "check_00a": [
        ("generator = np.random.default_rng((seed, number))", "generator = np.random.default_rng()", "drawn again"),
        ("(seed, number))", "number)", "seeds 0 and 1"),
        ("(seed, number))", "seed)", "pictures 0 and 1"),
        ("(seed, number))", "seed + number)", "a sum of seed and number"),
        ("generator.standard_normal(shape)", "generator.random(shape)", "standard normal"),
        (
            "generator = np.random.default_rng((seed, number))",
            "np.random.seed([seed, number]); generator = np.random",
            "moves the global generator",
        ),
    ],
    "check_00b": [
        ("(after - floor) / (ceiling - floor)", "after / ceiling", "subtract the floor first"),
        ("(ceiling - floor)", "ceiling", "divide by the whole way"),
        (" / (ceiling - floor)", "", "without a scale"),
        ("(after - floor)", "(ceiling - after)", "still missing"),
        ("(ceiling - floor)", "(1 - floor)", "take 1 as the best possible"),
        ("(after - floor) / (ceiling - floor)", "min(1, (after - floor) / (ceiling - floor))", "cut off"),
    ],
    "check_01a": [
        ("a photo of {identifier}", "a photo of a {identifier}", "used like a name"),
        ("of {article} {class_word}", "of {class_word}", "lacks its article"),
        ("of {article} {class_word}", "of {identifier} {class_word}", "holds the identifier"),
        ("{identifier} {class_word}", "{identifier}", "lacks the class word"),
        ('"an" if class_word[0] in "aeiou" else "a"', '"a"', "a elephant"),
        (
            'f"a photo of {identifier} {class_word}", f"a photo of {article} {class_word}"',
            'f"a photo of {article} {class_word}", f"a photo of {identifier} {class_word}"',
            "in the other order",
        ),
    ],
    "check_01b": [
        (" if number not in special]", "]", "special tokens before and after"),
        ('"rare" if ids[0] > 0.9 * highest else "common"', '"rare"', "its number has to be looked at"),
        ("ids[0] > 0.9", "ids[0] < 0.9", "the wrong way round"),
        ("len(ids) > 1", "not ids", "pieces"),
        ("0.9 * highest", "0.8 * highest", "last tenth of the numbers"),
        ("values() if number not in special)", "values())", "a tenth of the ordinary tokens"),
    ],
    "check_02a": [
        ("hashlib.sha256(text.encode()).hexdigest()[:16]", "str(hash(text))", "another number in every process"),
        (", sort_keys=True", "", "in another order"),
        ("json.dumps(recipe, sort_keys=True)", 'recipe["prompt"] + str(recipe["seed"])', "differ only in 'base'"),
        (
            "json.dumps(recipe, sort_keys=True)",
            '"".join(str(recipe[k]) for k in sorted(recipe))',
            "run into each other",
        ),
        ("hexdigest()[:16]", "hexdigest()[:3]", "keep more characters"),
        ("hashlib.sha256(text.encode()).hexdigest()[:16]", "text", "cannot be the name of a folder"),
        ("hexdigest()[:16]", "digest()", "return a string"),
    ],
    "check_02b": [
        (
            "[n for n in range(count) if n not in recorded or found.get(n) != recorded[n]]",
            "list(range(len(found), count))",
            "count the files",
        ),
        ("n not in recorded or found.get(n) != recorded[n]", "n not in recorded or n not in found", "compare its hash"),
        (
            "n not in recorded or found.get(n) != recorded[n]",
            "n not in found or recorded.get(n, found[n]) != found[n]",
            "not in the manifest",
        ),
        (
            "[n for n in range(count) if n not in recorded or found.get(n) != recorded[n]]",
            "list(range(count)) if found != recorded else []",
            "all six again",
        ),
        (
            "n not in recorded or found.get(n) != recorded[n]",
            "found.get(n) != recorded.get(n)",
            "nothing equals nothing",
        ),
        (
            "n not in recorded or found.get(n) != recorded[n]",
            "n in recorded and found.get(n) == recorded[n]",
            "the numbers of the others",
        ),
        ("range(count)", "range(6)", "below `count`"),
    ],
    "check_03a": [
        ("return known[name]", "return name", "return the class itself"),
        (
            '(config.get("architectures") or ["(none)"])[0]',
            '{"clip_text_model": "CLIPTextModel", "t5": "T5EncoderModel"}.get(config["model_type"])',
            "share the model type",
        ),
        (
            "raise ValueError(f\"The text encoder {name} is not known here; known are {', '.join(known)}.\")",
            'name = "CLIPTextModel"',
            "would fail later",
        ),
        (
            "    if name not in known:\n"
            "        raise ValueError(f\"The text encoder {name} is not known here; known are {', '.join(known)}.\")\n",
            "",
            "raises KeyError",
        ),
        ("The text encoder {name} is", "This text encoder is", "which architecture is unknown"),
        ("; known are {', '.join(known)}", "", "which architectures are known"),
        (
            '(config.get("architectures") or ["(none)"])[0]',
            'config["architectures"][0]',
            "a bare config raises KeyError",
        ),
    ],
    "check_03b": [
        ("empty + guidance_scale * (told - empty)", "told + guidance_scale * (empty - told)", "the wrong way"),
        ("v = empty + guidance_scale", "v = guidance_scale", "that it starts from"),
        (
            "picture = a**0.5 * x - (1 - a) ** 0.5 * v\n    noise = (1 - a) ** 0.5 * x + a**0.5 * v",
            "picture = (x - (1 - a) ** 0.5 * v) / a**0.5\n    noise = v",
            "a mix of noise and picture",
        ),
        ("return a_next**0.5 * picture + (1 - a_next) ** 0.5 * noise", "return picture", "put the noise"),
        (
            "a_next**0.5 * picture + (1 - a_next) ** 0.5 * noise",
            "a**0.5 * picture + (1 - a) ** 0.5 * noise",
            "gives x back",
        ),
        ("x + a**0.5 * v", "x + a**0.5 * v\n    noise = -noise", "sign of the noise"),
        (
            "a**0.5 * x - (1 - a) ** 0.5 * v\n    noise = (1 - a) ** 0.5 * x + a**0.5 * v\n"
            "    return a_next**0.5 * picture + (1 - a_next) ** 0.5 * noise",
            "a * x - (1 - a) * v\n    noise = (1 - a) * x + a * v\n    return a_next * picture + (1 - a_next) * noise",
            "without the roots",
        ),
    ],
    "check_04a": [
        ("self.scale * self.B", "self.B", "is not scaled"),
        ("alpha / rank", "alpha", "by alpha alone"),
        ("alpha / rank", "rank / alpha", "scale is turned round"),
        ("        nn.init.zeros_(self.B.weight)\n", "", "has to start at zero"),
        ("nn.init.normal_(self.A.weight, std=1 / rank)", "nn.init.zeros_(self.A.weight)", "A starts at zero like B"),
        ("layer.requires_grad_(False)", "layer", "freeze it"),
        (", stride=layer.stride", "", "kernel size, stride and padding"),
        ("self.layer(x) + ", "", "own answer is missing"),
        ("bias=False, **size", "**size", "has a bias"),
    ],
    "check_04b": [
        ("alpha / A.shape[0] * change", "change", "not scaled"),
        ("alpha / A.shape[0]", "alpha", "divide by the rank"),
        ("A.shape[0]", "A.shape[1]", "number of columns"),
        ("weight + alpha", "alpha", "add it to the weight"),
        (
            "return weight + alpha / A.shape[0] * change.view_as(weight)",
            "weight += alpha / A.shape[0] * change.view_as(weight)\n    return weight",
            "make a new one",
        ),
        ("change = B.flatten(1) @ A.flatten(1)", "change = (B.flatten(1) @ A.flatten(1)).T", "is transposed"),
        ("B.flatten(1) @ A.flatten(1)", "B @ A", "write both kernels as matrices"),
    ],
    "check_05a": [
        (
            "for half in halves for sample in samples])",
            "for sample in samples for half in halves])",
            "no error would say so",
        ),
        ("for half in halves for sample in samples", "for sample in samples for half in halves", "but they alternate"),
        (
            'prompts = [sample[f"{half}_prompt"] for half in halves for sample in samples]',
            'prompts = [sample[f"{half}_prompt"] for sample in samples for half in halves]',
            "they need the same order",
        ),
        ('("instance", "class")', '("class", "instance")', "the class comes first"),
        ("torch.stack", "torch.cat", "run into each other"),
        ("return pixels, prompts", "return pixels.unflatten(0, (2, -1)), prompts", "a dimension of their own"),
    ],
    "check_05b": [
        ("int(order[place])", "place", "order of their names"),
        ("(seed, epoch)", "seed", "repeats the first one's order"),
        ("(seed, epoch)", "epoch", "two seeds give the same order"),
        ("(seed, epoch)", "seed + epoch", "a sum of the two"),
        ("(seed, epoch)", "(seed, n)", "more than once"),
        ("np.random.default_rng((seed, epoch))", "np.random", "shows another image"),
    ],
    "check_06a": [
        (".sqrt()", "", "not rooted"),
        ("a.sqrt() * x0 + (1 - a).sqrt() * noise", "a.sqrt() * noise + (1 - a).sqrt() * x0", "changed places"),
        ("a.sqrt() * x0", "x0", "of full strength"),
        ("(1 - a).sqrt()", "(1 - a.sqrt())", "`1 - sqrt(alpha)`"),
        (".view(-1, 1, 1, 1)", "", "along the width"),
        ("alphas[timesteps].view(-1, 1, 1, 1)", "alphas[timesteps[0]]", "the first one's level"),
        ("(1 - a).sqrt() * noise", "noise", "noise is not scaled"),
    ],
    "check_06b": [
        (
            "prior_loss_weight * prior.mean()",
            "prior_loss_weight * errors.mean()",
            "your prior loss is averaged over both",
        ),
        ("instance.mean() +", "errors.mean() +", "your instance loss is averaged over both"),
        (
            "instance.mean() + prior_loss_weight * prior.mean()",
            "prior_loss_weight * instance.mean() + prior.mean()",
            "at the wrong half",
        ),
        ("prior_loss_weight * prior.mean()", "prior.mean()", "the weight is not used"),
        ("instance.mean() + prior_loss_weight * prior.mean()", "errors.mean()", "so neither can be weighted"),
        ("errors.chunk(2)", "errors.chunk(2, dim=1)", "along the channels"),
        ("errors.chunk(2)", "errors[::2], errors[1::2]", "every other picture"),
        ("mean()", "sum()", "add the errors up"),
        ("(prediction - target) ** 2", "(prediction - target).abs()", "absolute differences"),
        (
            "return instance.mean() + prior_loss_weight * prior.mean()",
            "return (instance.mean() + prior_loss_weight * prior.mean()).item()",
            "no gradient flows back",
        ),
    ],
    "check_06c": [
        ("    loss.backward()\n", "", "or never were there"),
        ("    torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)\n", "", "are not clipped"),
        (
            "    torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)\n    optimizer.step()\n",
            "    optimizer.step()\n    torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)\n",
            "clip after the step",
        ),
        ("    optimizer.zero_grad(set_to_none=True)\n", "", "call `zero_grad`"),
        ("clip_grad_norm_", "clip_grad_value_", "turns the step's direction"),
        ("    loss.backward()\n", "    optimizer.step()\n    loss.backward()\n", "made 2 steps"),
        ("loss.item()", "loss", "keeps the whole graph"),
        (
            "    loss.backward()\n    torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)\n    optimizer.step()\n"
            "    optimizer.zero_grad(set_to_none=True)\n",
            "    optimizer.step()\n    loss.backward()\n",
            "comes first",
        ),
    ],
    "check_07a": [
        ('strength * layer.lora_alpha["default"] / layer.r["default"]', "strength", "as strong as it was trained"),
        (
            'layer.scaling["default"] = strength * layer.lora_alpha["default"] / layer.r["default"]',
            'layer.scaling["default"] *= strength',
            "not from what it is now",
        ),
        ("model.modules()", "model.children()", "walk through `model.modules()`"),
        (' / layer.r["default"]', "", "not divided by the rank"),
        (
            'layer.lora_alpha["default"] / layer.r["default"]',
            'layer.r["default"] / layer.lora_alpha["default"]',
            "changed places",
        ),
        (
            'layer.scaling["default"] = strength * layer.lora_alpha["default"] / layer.r["default"]',
            'layer.lora_B["default"].weight.data *= strength',
            "the trained adapter is lost",
        ),
        ("            count += 1", "        count += 1", "ask for `lora_A`"),
    ],
    "check_07b": [
        (", dtype=int", "", "uint8"),
        ("int(np.abs(difference).max())", "int(difference.max())", "below zero"),
        ("max(largest, int(np.abs(difference).max()))", "float(np.abs(difference).mean())", "a mean hides"),
        ("    return largest", "        return largest", "only the first pair"),
        ("max(largest, int(np.abs(difference).max()))", "int(np.abs(difference).max())", "the last pair's"),
        (", strict=True", "", "needs `strict=True`"),
    ],
    "check_08a": [
        ("torch.nn.functional.normalize(x, dim=1)", "x", "normalise them first"),
        ("(drawn @ photographs.T).mean()", "(drawn @ photographs.T).max(1).values.mean()", "measures copying"),
        ("(drawn_clip * texts).sum(1).mean()", "(drawn_clip @ texts.T).mean()", "compare each with its own"),
        ("/ (n * (n - 1))", "/ n**2", "also compared with itself"),
        ("(classes @ photographs.T)", "(classes @ drawn.T)", "compare it with the photographs"),
        ("(1 - classes @ classes.T).sum().item()", "((classes @ classes.T).sum().item() - n)", "that is a similarity"),
        ("(classes @ photographs.T)", "(classes @ classes.T)", "the class with itself"),
        (
            "(drawn @ photographs.T).mean()",
            "torch.nn.functional.cosine_similarity(drawn.mean(0), photographs.mean(0), dim=0)",
            "two mean vectors",
        ),
        (".sum(1).mean()", ".mean()", "number of features"),
    ],
    "check_08b": [
        ("first[seed] - second[seed]", "second[seed] - first[seed]", "first minus second"),
        (
            "[first[seed] - second[seed] for seed in first.keys() & second.keys()]",
            "[a - b for a, b in zip(first.values(), second.values())]",
            "look them up by seed",
        ),
        (
            "statistics.mean(paired)",
            "statistics.mean(first.values()) - statistics.mean(second.values())",
            "only one row has",
        ),
        (" / len(paired) ** 0.5", "", "standard deviation of the differences"),
        (" ** 0.5", "", "shrinks with its root"),
        ("stdev", "pstdev", "n - 1"),
        (
            "statistics.stdev(paired)",
            "sum(statistics.stdev([row[s] for s in (0, 1, 2)]) ** 2 for row in (first, second)) ** 0.5",
            "add up the spreads",
        ),
    ],
    "check_09a": [
        ('    if A.dtype != torch.float32:\n        return "half precision"\n', "", "look at the format"),
        (
            "not all(math.isfinite(loss) for loss in run.losses)",
            "any(loss > 10 for loss in run.losses)",
            "is false for `nan`",
        ),
        ("run.loaded_alpha != run.alpha", "run.loaded_alpha > run.alpha", "compare the two"),
        ("< 0.01 * run.weight.norm()", "== 0", "compare B A with the weight"),
        ("all(any(torch.equal", "any(any(torch.equal", "compare them one by one"),
        ('"learned by heart" if after > before else ALL_IS_WELL', "ALL_IS_WELL", "held-out loss has risen"),
        ('"learned by heart" if after > before else ALL_IS_WELL', '"learned by heart"', "finds nothing"),
    ],
    "check_09b": [
        ("unet.{name}", "{name}", "seems to reach nothing"),
        (
            "    keys = set(keys)\n",
            '    keys = {key.replace("unet.", "") for key in keys}\n    layers = [l for l in layers]\n'
            '    return {n for n in layers if f"{n}.lora_A.weight" in keys and f"{n}.lora_B.weight" in keys}\n',
            "wherever it occurs",
        ),
        (
            '{f"unet.{name}.lora_A.weight", f"unet.{name}.lora_B.weight"} <= keys',
            'f"unet.{name}.lora_A.weight" in keys',
            "only one of its matrices",
        ),
        (
            "    keys = set(keys)\n",
            '    return {k[5:-14] for k in keys if k.startswith("unet.") and k.replace("lora_A", "lora_B") in keys} - '
            '{k[5:-14] for k in keys if k.replace("lora_B", "lora_A") not in keys}\n',
            "this UNet does not have",
        ),
        ("{name for name in layers", "{key for key in keys for name in layers", "you return keys of the file"),
        (
            "    keys = set(keys)\n",
            '    keys = {"unet." + k.split(".", 1)[1] for k in keys}\n',
            "keys of the text encoder",
        ),
        ("    keys = set(keys)\n", '    keys = set(keys) | {"unet." + k for k in keys}\n', "or with none"),
    ],
    "check_10a": [
        ("16 * adapters", "4 * adapters", "forget the two moments"),
        ("16 * adapters", "8 * adapters", "you count 8"),
        ("16 * adapters", "2 * adapters", "as if they were half precision"),
        ("2 * train_batch_size", "train_batch_size", "forget the class images"),
        ("activations * pictures", "activations", "count those of one"),
        ("2 * frozen", "16 * frozen", "need no gradients"),
        ("2 * frozen", "4 * frozen", "frozen weights as float32"),
        ("2**30", "10**9", "a GiB is 2**30"),
    ],
    "check_10b": [
        ("(2 * activations)", "activations", "counts pairs"),
        ("int(free / (2 * activations))", "-int(-free // (2 * activations))", "you round up"),
        ("card - 2 - weights - adapters", "card", "subtract them from the card"),
        ("card - 2 -", "card -", "CUDA context"),
        ("card - 2 - weights - adapters", "card - 2 - adapters", "frozen weights are missing"),
        ("max(0, int(free / (2 * activations)))", "int(free // (2 * activations))", "the answer is 0"),
        (" - adapters", "", "with adapters of 2.7 GiB"),
        ("int(free / (2 * activations))", "free / (2 * activations)", "cannot be trained"),
    ],
    "check_11a": [
        ("(1 - share) * x + share * noise", "share * x + (1 - share) * noise", "picture and noise have changed places"),
        ("(1 - share) * x + share * noise", "(1 - share).sqrt() * x + share.sqrt() * noise", "diffusion's roots"),
        ("(1 - share) * x", "x", "picture of full strength"),
        ("share * noise, ", "noise, ", "the noise is not scaled"),
        ("s.view(-1, 1, 1, 1)", "s", "along the width"),
        ("s.view(-1, 1, 1, 1)", "s[0]", "the first one's share"),
        ("noise - x", "x - noise", "from the noise to the picture"),
        ("noise - x", "noise", "your target is the noise"),
        ("noise - x", "x", "your target is the picture"),
        ("noise - x", "noise - ((1 - share) * x + share * noise)", "starts at the noisy picture"),
        ("noise - x", "(1 - share) * noise - share * x", "v of a diffusion model"),
        ("noise - x", "share * (noise - x)", "shortened by s"),
        (
            "(1 - share) * x + share * noise, noise - x",
            "noise - x, (1 - share) * x + share * noise",
            "two have changed",
        ),
        (", noise - x", "", "return two tensors"),
    ],
    "check_11b": [
        ("(following - share)", "(share - following)", "the wrong way"),
        ("(following - share)", "-share", "all the way to a picture"),
        ("velocity(x, share)", "velocity(x, following)", "where a step ends"),
        ("velocity(x, share)", "velocity(noise, share)", "at the noise each time"),
        ("pairwise(shares)", "pairwise(shares[:-1])", "the last step is missing"),
        ("pairwise(shares)", "pairwise(shares[1:])", "the first step is missing"),
        ("(following - share)", "-1 / (len(shares) - 1)", "all of one length"),
        ("velocity(x, share)", "velocity(noise, 1.0)", "first one's direction"),
        ("        x = x + ", "        y = x + ", "the noise that you began with"),
        (" * velocity(x, share)", " * (velocity(x, share) + velocity(x, share)) / 2", "6 times for 3 steps"),
    ],
}


@by_check
def test_each_mistake_gets_a_sentence_of_its_own(check, capsys):
    right, sentences = solution(check), []
    for old, new, words in MISTAKES[check]:
        assert old in right, f"{old!r} is not in the solution"
        sentences.append(said(check, right.replace(old, new), capsys))
        assert sentences[-1].startswith("Not yet: ") and words in sentences[-1], (new, sentences[-1])
    assert len(set(sentences)) == len(sentences) >= 5


@by_check
def test_an_error_of_the_learner_is_told_and_not_raised(check, capsys):
    name = EXERCISES[check][0]
    wrong = textwrap.dedent(
        f"""
        def {name}(*arguments):
            raise TypeError("a slip")
        """
    )
    assert "TypeError" in said(check, wrong, capsys)


@by_check
@pytest.mark.parametrize("garbage", ["object()", "'x'", "-1", "()", "[None]", "float('nan')", "{}", "lambda *a: a"])
def test_a_result_of_another_kind_is_told_and_not_raised(check, garbage, capsys):
    name = EXERCISES[check][0]
    assert said(check, f"def {name}(*arguments):\n    return {garbage}\n", capsys).startswith("Not yet: ")
