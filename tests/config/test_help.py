"""`--help` and the page of settings say what the fields say."""

import subprocess
import sys
from pathlib import Path

from horen_bench.config.help import help_text, settings_page
from horen_bench.config.schema import RunConfig

PAGE = Path(__file__).parents[2] / "docs" / "settings.md"


def test_help_lists_choices_and_every_setting_of_a_run_with_its_meaning() -> None:
    text = help_text([])
    assert "method: alphaedit, ft_l" in text
    for name, field in RunConfig.model_fields.items():
        if name not in ("model", "method", "dataset", "tracker", "text"):
            assert f"  {name}=" in text
            assert str(field.description) in text
    assert "method.hopfield.beta=20.0  (number, > 0)" in text
    assert "text.max_new_tokens=512" in text


def test_help_is_about_the_chosen_method_and_survives_a_wrong_one() -> None:
    assert "method.merge_freq=" in help_text(["method=wise", "n=5"])
    assert "method.threshold=" in help_text(["method=wize"])


def test_the_page_of_settings_is_the_one_that_the_code_makes() -> None:
    """`python -m horen_bench.config.help > docs/settings.md` makes it again."""
    assert PAGE.read_text(encoding="utf-8") == settings_page()


def test_help_needs_no_heavy_package(tmp_path: Path) -> None:
    script = (
        "import sys; sys.argv = ['horen_bench', '--help']\n"
        "from horen_bench.__main__ import main\n"
        "main(); print(sorted({'torch', 'transformers', 'pandas'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.splitlines()[-1] == "[]"
