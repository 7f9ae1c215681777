"""Finding, making and reading a workspace."""

from __future__ import annotations

from pathlib import Path

import pytest

from jupiter_engine.errors import ConfigError, UsageError
from jupiter_engine.settings import workspace
from jupiter_engine.settings.domain import check_paths, load_domain
from jupiter_engine.settings.workspace import create, domain_file, domains, find_workspace, init, new_domain


def test_where_the_workspace_is(tmp_path: Path) -> None:
    here, home = tmp_path / "here", tmp_path / "home"
    environ = {"HOME": str(home)}
    assert find_workspace(None, environ, here) == home / ".jupiter"
    (here / "config").mkdir(parents=True)
    assert find_workspace(None, environ, here) == home / ".jupiter"
    (here / "config" / "cluster.yaml").touch()
    assert find_workspace(None, environ, here) == here
    assert find_workspace(None, environ | {"JUPITER_HOME": "/srv/j"}, here) == Path("/srv/j")
    assert find_workspace(None, environ | {"JUPITER_HOME": ""}, here) == here
    assert find_workspace(Path("sub"), environ | {"JUPITER_HOME": "/srv/j"}, here) == here / "sub"
    assert find_workspace(Path("/abs"), environ, here) == Path("/abs")


def test_the_first_use_copies_the_shipped_settings(tmp_path: Path) -> None:
    root = tmp_path / "a" / "b"
    written = create(root)
    assert written[-1] == root / "config" / "cluster.yaml"
    assert domains(root) == ["python"]
    shipped = workspace.shipped_folder()
    for file in written:
        assert file.read_bytes() == (shipped / file.relative_to(root / "config")).read_bytes()
    assert create(root) == []


def test_what_the_user_removed_or_changed_stays_so(tmp_path: Path) -> None:
    create(tmp_path)
    (tmp_path / "config" / "domains" / "python.yaml").unlink()
    (tmp_path / "config" / "cluster.yaml").write_text("mine")
    assert create(tmp_path) == []
    assert domains(tmp_path) == []
    assert init(tmp_path) == [tmp_path / "config" / "domains" / "python.yaml"]
    assert (tmp_path / "config" / "cluster.yaml").read_text() == "mine"


def test_a_copy_that_was_cut_short_is_completed(tmp_path: Path) -> None:
    create(tmp_path)
    (tmp_path / "config" / "cluster.yaml").unlink()
    (tmp_path / "config" / "domains" / "python.yaml").unlink()
    assert len(create(tmp_path)) == 2


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for root in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / ("x" * 300)):
        with pytest.raises(ConfigError, match="cannot be used as a workspace") as caught:
            create(root)
        assert "--workspace" in caught.value.fix


def test_finding_a_domain(tmp_path: Path) -> None:
    create(tmp_path)
    assert domain_file(tmp_path, "python") == tmp_path / "config" / "domains" / "python.yaml"
    (tmp_path / "config" / "domains" / "rocks.yml").touch()
    for name, said in (
        ("pyton", "did you mean python?"),
        ("Python", "did you mean python?"),
        ("zzz", "(there: python)"),
        ("rocks", "domain files end in .yaml"),
        ("_template", "there is no domain"),
        ("../cluster", "there is no domain"),
        ("", "there is no domain"),
        ("\x1b[31m\ud800", "there is no domain"),
        ("x" * 5000, "there is no domain"),
    ):
        with pytest.raises(ConfigError) as caught:
            domain_file(tmp_path, name)
        assert said in caught.value.detail
        assert caught.value.sentence().isprintable()


@pytest.mark.parametrize(
    "name", ["chemistry", "a", "123", "null", "on", "1e5", "0x1f", "2024-01-01", "a_b-c", "x" * 63]
)
def test_a_new_domain_loads_at_once(name: str, tmp_path: Path) -> None:
    create(tmp_path)
    file = new_domain(tmp_path, name)
    loaded = load_domain(file)
    assert loaded.warnings == ()
    assert loaded.value.domain.name == name
    assert loaded.value.domain.description == f"What an expert on {name} knows"
    (source,) = loaded.value.sources
    assert source.path == str(tmp_path / "config" / "domains" / name)
    check_paths(loaded)
    assert "my_domain" not in file.read_text()
    readme = (tmp_path / "config" / "domains" / name / "README").read_text()
    assert f"jupiter start --domain {name}" in readme
    assert name in domains(tmp_path)


@pytest.mark.parametrize(
    "description",
    ['say "hi"', "a: b # c", "two\nlines", "\\1 \\g<0> {x}", "ñ 你好 😀", "\x1b[0m\x00\x85\u2028\ud800", "- x"],
)
def test_any_description_is_kept_as_text(description: str, tmp_path: Path) -> None:
    create(tmp_path)
    loaded = load_domain(new_domain(tmp_path, "rocks", description))
    kept = loaded.value.domain.description
    assert kept.isprintable()
    if description.isprintable():
        assert kept == description


@pytest.mark.parametrize("name", ["", "Über", "a b", "_x", "-x", "a/b", "..", "a\n", "x" * 64])
def test_names_that_cannot_be(name: str, tmp_path: Path) -> None:
    create(tmp_path)
    with pytest.raises(UsageError, match="cannot be the name of a domain"):
        new_domain(tmp_path, name)
    assert domains(tmp_path) == ["python"]


def test_an_existing_domain_is_never_overwritten(tmp_path: Path) -> None:
    create(tmp_path)
    before = (tmp_path / "config" / "domains" / "python.yaml").read_bytes()
    with pytest.raises(ConfigError, match="exists already"):
        new_domain(tmp_path, "python")
    assert (tmp_path / "config" / "domains" / "python.yaml").read_bytes() == before


def test_a_template_of_the_users_own_is_used_and_a_broken_one_leaves_nothing(tmp_path: Path) -> None:
    create(tmp_path)
    template = tmp_path / "config" / "domains" / "_template.yaml"
    text = template.read_text()
    template.write_text(text.replace("steps: 30", "steps: 7"))
    assert load_domain(new_domain(tmp_path, "rocks")).value.training.steps == 7
    template.write_text(text.replace("steps: 30", "stesp: 7"))
    with pytest.raises(ConfigError, match="did you mean `steps`"):
        new_domain(tmp_path, "stones")
    assert domains(tmp_path) == ["python", "rocks"]
    template.unlink()
    assert load_domain(new_domain(tmp_path, "stones")).value.training.steps == 30
