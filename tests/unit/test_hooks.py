"""Functions of the user's, named by a setting."""

import pytest

from igpo_megatron.settings import Hooked, is_hook, load_hook
from igpo_megatron.types import UserError


def test_a_hook_is_what_the_setting_names(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("def double(x):\n    return 2 * x\nnumber = 3\n", encoding="utf-8")
    (tmp_path / "broken.py").write_text("1 / 0\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    assert load_hook("loss.name", "mine:double")(4) == 8
    for name, reason in {
        "mine:triple": "AttributeError",
        "absent_package.x:f": "ModuleNotFoundError",
        "broken:f": "ZeroDivisionError",
        "mine:number": "is a int; expected a function",
    }.items():
        with pytest.raises(UserError, match=f"loss.name={name}.*{reason}"):
            load_hook("loss.name", name)


@pytest.mark.parametrize(
    ("name", "expected"), [("a.b:c", True), ("ppo", False), ("a:b:c", False), ("a.b", False), (":f", False), ("a b:c", False)]
)
def test_only_a_path_to_something_is_a_hook(name, expected):
    assert is_hook(name) is expected
    if not expected:
        with pytest.raises(ValueError, match="pattern"):
            Hooked(name=name)
