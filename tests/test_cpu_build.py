import ctypes
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kernels import cpu_build
from nanochat_ray.errors import UserError

SMALL = 'extern "C" __attribute__((visibility("default"))) int answer() { return 42; }\n'


@pytest.fixture
def small_source(tmp_path, monkeypatch):
    """Something that compiles at once, in place of the kernel, and an empty cache."""
    folder = tmp_path / "sources" / "cpu_step"
    folder.mkdir(parents=True)
    (folder / "step.cpp").write_text(SMALL)
    monkeypatch.setattr(cpu_build, "SOURCES", folder.parent)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    cpu_build.load.cache_clear()
    yield folder / "step.cpp"
    cpu_build.load.cache_clear()


def kept() -> list[Path]:
    return sorted(cpu_build.cache_folder().iterdir())


def test_it_is_compiled_once_and_again_when_anything_changes(small_source):
    assert cpu_build.load("cpu_step").answer() == 42
    (first,) = kept()
    assert first.parent == Path(os.environ["XDG_CACHE_HOME"], "nanochat_ray", "kernels")
    made = first.stat().st_mtime_ns
    cpu_build.load.cache_clear()
    assert cpu_build.load("cpu_step").answer() == 42
    assert first.stat().st_mtime_ns == made
    assert cpu_build.load("cpu_step", ("-DOTHER",)).answer() == 42
    assert len(kept()) == 2
    small_source.write_text(SMALL.replace("42", "43"))
    cpu_build.load.cache_clear()
    assert cpu_build.load("cpu_step").answer() == 43
    assert len(kept()) == 3


def test_several_may_compile_at_once(small_source, tmp_path):
    command = [*cpu_build.find_compiler(), *cpu_build.FLAGS]
    target = tmp_path / "new" / "made.so"
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: cpu_build.compile_to(target, "cpu_step", command), range(8)))
    assert ctypes.CDLL(str(target)).answer() == 42
    assert list(target.parent.iterdir()) == [target]


def test_a_compiler_is_looked_for_where_people_put_it(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "/nowhere/c++ -m64")
    with pytest.raises(UserError, match=r"\$CXX is /nowhere/c\+\+ -m64, which is not installed"):
        cpu_build.find_compiler()
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="none of c\\+\\+, g\\+\\+, clang\\+\\+ is installed"):
        cpu_build.find_compiler()
    clang = tmp_path / "clang++"
    clang.touch(mode=0o755)
    assert cpu_build.find_compiler() == ["clang++"]
    monkeypatch.setenv("CXX", f"{clang} --target=x")
    assert cpu_build.find_compiler() == [str(clang), "--target=x"]


def test_what_the_compiler_says_is_passed_on(small_source):
    small_source.write_text("int answer() {\n  return missing;\n}\n")
    with pytest.raises(UserError, match="cannot compile the CPU kernel: .*missing"):
        cpu_build.load("cpu_step")
    assert kept() == []


def test_a_cache_that_cannot_be_written_is_named(small_source, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match="cannot be kept in .*file/nanochat_ray/kernels.*set XDG_CACHE_HOME"):
        cpu_build.load("cpu_step")


def test_a_damaged_library_says_what_to_delete(small_source, monkeypatch):
    def damage(target: Path, kernel: str, command: list[str]) -> None:
        target.parent.mkdir(parents=True)
        target.write_bytes(b"not a library")

    monkeypatch.setattr(cpu_build, "compile_to", damage)
    with pytest.raises(UserError, match="does not load: .*; delete .*cpu_step-.* to compile it again"):
        cpu_build.load("cpu_step")


@pytest.mark.parametrize("keep", [0.5, 0.0, 0.999])
def test_a_library_that_was_cut_off_is_compiled_again(small_source, keep):
    cpu_build.load("cpu_step")
    (target,) = kept()
    whole = target.read_bytes()
    target.unlink()  # the file that this process has loaded stays as it is
    target.write_bytes(whole[: int(keep * len(whole))])
    cpu_build.load.cache_clear()
    assert cpu_build.load("cpu_step").answer() == 42
    assert kept() == [target]
    assert target.read_bytes() == whole


@pytest.mark.parametrize(
    ("compiler", "why"),
    [
        ("g++ 'x", r"\$CXX is \"g\+\+ 'x\", which is no command \(No closing quotation\)"),
        ("{script}", r"no C\+\+ compiler: .*script cannot be run: .*Exec format error"),
        ("true", "true .* made no library: it said nothing"),
    ],
)
def test_what_is_no_compiler_is_told_from_one(small_source, tmp_path, monkeypatch, compiler, why):
    script = tmp_path / "script"
    script.write_text("no program\n")
    script.chmod(0o755)
    monkeypatch.setenv("CXX", compiler.format(script=script))
    with pytest.raises(UserError, match=why):
        cpu_build.load("cpu_step")


def test_importing_it_costs_no_torch():
    code = "import sys, kernels.cpu_build; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1]).returncode == 0


def test_all_are_compiled_at_once_before_anything_waits_for_them(small_source, capsys, monkeypatch):
    other = small_source.parents[1] / "cpu_other"
    other.mkdir()
    (other / "other.cpp").write_text(SMALL)
    (small_source.parents[1] / "cpu").mkdir()  # headers only: no kernel
    assert cpu_build.main() == 0
    assert [path.name.partition("-")[0] for path in kept()] == ["cpu_other", "cpu_step"]
    assert "are compiled: cpu_other, cpu_step" in capsys.readouterr().out
    cpu_build.load.cache_clear()
    monkeypatch.setenv("CXX", "/nowhere/c++")
    assert cpu_build.main() == 0
    assert "not compiled: no C++ compiler: $CXX is /nowhere/c++" in capsys.readouterr().err
