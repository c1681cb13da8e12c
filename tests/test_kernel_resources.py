"""The gate of the CUDA build: what ptxas prints is read rightly, and what got worse is told in one line."""

import json
import os
import sys
from dataclasses import replace

import compile_record
import kernel_resources
import pytest
from kernel_resources import Kernel, compare, parse

SCOPE = "flextron::(anonymous namespace)::"
PTXAS = f"""\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'void {SCOPE}tile_kernel<flextron::bf16, 128, true>(flextron::P<float>)' for 'sm_80'
ptxas info    : Function properties for void {SCOPE}tile_kernel<flextron::bf16, 128, true>(flextron::P<float>)
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 126 registers, used 1 barriers, 2048 bytes smem, 488 bytes cmem[0]
ptxas info    : Compile time = 375.239 ms
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'void {SCOPE}tile_kernel<flextron::bf16, 128, true>(flextron::P<float>)' for 'sm_90a'
ptxas info    : Function properties for void {SCOPE}tile_kernel<flextron::bf16, 128, true>(flextron::P<float>)
    32 bytes stack frame, 24 bytes spill stores, 28 bytes spill loads
ptxas info    : Function properties for flextron::helper(int)
    8 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 64 registers, used 1 barriers, 32 bytes cumulative stack size
ptxas info    : Compiling entry function 'void {SCOPE}wide_kernel<flextron::Shape<flextron::fp16, 64> >({SCOPE}Q)' for 'sm_90a'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers
"""  # noqa: E501

GOOD = Kernel("a.cu", "tile_kernel<bf16>", "sm_80", 100, 2048, 0, 0)


def test_every_kernel_of_every_target_is_read():
    assert parse("a.cu", PTXAS) == [
        Kernel("a.cu", "tile_kernel<bf16, 128, true>", "sm_80", 126, 2048, 0, 0),
        Kernel("a.cu", "tile_kernel<bf16, 128, true>", "sm_90a", 64, 0, 40, 52),
        Kernel("a.cu", "wide_kernel<Shape<fp16, 64>>", "sm_90a", 168, 0, 0, 0),
    ]


def test_text_without_kernels_has_none():
    assert (
        parse("a.cu", "ptxas info    : 0 bytes gmem\n    8 bytes stack frame, 0 bytes spill stores\n") == []
    )


@pytest.mark.parametrize(
    "name, short",
    [
        ("void flextron::kernel<double>(flextron::P<double>)", "kernel<double>"),
        ("flextron::kernel(flextron::P<double>, long)", "kernel"),
        ("void a::kernel<(int)64, (bool)0>(a::P)", "kernel<64, false>"),
    ],
)
def test_a_name_is_short(name, short):
    assert kernel_resources.readable(name) == short


def test_overloads_keep_their_arguments():
    text = "".join(
        f"ptxas info : Compiling entry function 'void f::k({argument})' for 'sm_80'\n"
        for argument in ("f::P", "f::Q")
    )
    assert [kernel.kernel for kernel in parse("a.cu", text)] == ["k(P)", "k(Q)"]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"registers": 109}, "registers must be at most 100 + 8, got 109"),
        ({"shared_bytes": 2049}, "shared_bytes must be at most 2048, got 2049"),
        ({"stack_bytes": 8}, "stack_bytes must be 0, got 8"),
        ({"spill_bytes": 4}, "spill_bytes must be 0, got 4"),
    ],
)
def test_what_got_worse_is_one_line(change, message):
    assert compare([GOOD], [replace(GOOD, **change)]) == [f"a.cu tile_kernel<bf16> sm_80: {message}"]


def test_rows_and_kernels_must_match():
    other = replace(GOOD, arch="sm_90a")
    assert compare([GOOD], [GOOD, other]) == ["a.cu tile_kernel<bf16> sm_90a: must have a row, got none"]
    assert compare([GOOD, other], [GOOD]) == [
        "a.cu tile_kernel<bf16> sm_90a: must be compiled, got a row without a kernel"
    ]


@pytest.fixture
def build(tmp_path, monkeypatch, compiler):
    """A build of csrc/kernels/a.cu for some architectures, and a table with a row for sm_80 and one for sm_90a."""
    folder = tmp_path / "csrc" / "kernels"
    folder.mkdir(parents=True)
    (folder / "a.cu").touch()
    monkeypatch.setattr(kernel_resources, "ROOT", tmp_path)
    monkeypatch.setattr(kernel_resources, "DATABASE", tmp_path)
    monkeypatch.setattr(kernel_resources.shutil, "which", lambda name: name)
    monkeypatch.setattr(kernel_resources, "demangle", lambda text: text)
    rows = [replace(GOOD, file="csrc/kernels/a.cu", arch=arch) for arch in ("sm_80", "sm_90a")]
    monkeypatch.setattr(kernel_resources, "read_table", lambda: rows)
    monkeypatch.setattr(kernel_resources, "write_table", lambda kernels: None)

    def main(*archs, arguments=()):
        text = "".join(f"Compiling entry function 'tile_kernel<bf16>' for '{arch}'\n" for arch in archs)
        made = compile_record.Compile("csrc/kernels/a.cu", 0, text, 1.0, 1)
        monkeypatch.setattr(kernel_resources, "run", lambda *job: made)
        command = compiler("a.cu", *(f"--generate-code=arch=compute,code=[{arch}]" for arch in archs))
        monkeypatch.setattr(kernel_resources, "commands", lambda: [("csrc/kernels/a.cu", command, "/")])
        monkeypatch.setattr("sys.argv", ["kernel_resources.py", *arguments])
        return kernel_resources.main()

    return main


def test_a_build_for_one_gpu_is_held_against_its_rows(build, capsys):
    assert build("sm_80", "sm_90a") == build("sm_90a") == 0
    assert build("sm_86") == 0  # of which the table says nothing
    assert "1 kernels" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        build("sm_90a", arguments=["--update"])
    assert "--update must be given a build for sm_80, sm_90a, got one for sm_90a" in capsys.readouterr().err


def test_a_few_registers_more_or_fewer_pass():
    assert compare([GOOD], [replace(GOOD, registers=108)]) == []
    assert compare([GOOD], [replace(GOOD, registers=40, shared_bytes=0)]) == []


def test_the_table_reads_back(tmp_path):
    rows = parse("a.cu", PTXAS)
    kernel_resources.write_table(rows, tmp_path / "table.csv")
    assert kernel_resources.read_table(tmp_path / "table.csv") == rows


def test_a_slow_or_large_build_is_told(capsys):
    big = compile_record.Compile("a.cu", 0, "", 700.0, 3 << 30)
    small = compile_record.Compile("b.cu", 0, "", 59.0, 3 << 30)
    assert kernel_resources.report([GOOD], [big, small], 1.0) == [
        "a clean build must take at most 600 s on 2 cores, got 700",
        "a.cu: must take at most 60 s of a core to compile, got 700",
        "a clean build must take at most 4 GiB, got 6.00",
    ]
    assert "tile_kernel<bf16>" in capsys.readouterr().out


def test_without_nvcc_it_says_so_and_passes(monkeypatch, capsys):
    monkeypatch.setattr(kernel_resources.shutil, "which", lambda name: None)
    monkeypatch.setattr("sys.argv", ["kernel_resources.py"])
    assert kernel_resources.main() == 0
    assert "nvcc is not here" in capsys.readouterr().out


@pytest.fixture
def compiler(tmp_path):
    """A compile command whose compiler writes its arguments into the object, and says two lines."""
    program = tmp_path / "compiler.py"
    program.write_text(
        "import sys\n"
        "words = sys.argv[1:]\n"
        "open(words[words.index('-o') + 1], 'w').write(' '.join(words))\n"
        "print('ptxas info    : 0 bytes gmem'), print('remark')\n"
        "sys.exit('-fail' in words)\n"
    )

    def command(source, *flags):
        target = str(tmp_path / f"{source}.o")
        return [sys.executable, str(program), *flags, "-o", target, "-c", source]

    return command


def test_a_build_is_read_instead_of_run_again(compiler, tmp_path, capfd):
    command = compiler("a.cu")
    assert compile_record.main([*command[:2], "-MD", "-MT", "x", "-MF", "x.d", *command[2:]]) == 0
    assert capfd.readouterr().err == "remark\n"
    made = (tmp_path / "a.cu.o").stat().st_mtime_ns
    found = kernel_resources.run("a.cu", command, str(tmp_path))
    assert found.output == "ptxas info    : 0 bytes gmem\nremark\n" and found.seconds > 0
    assert found.peak_bytes > 1 << 20
    assert (tmp_path / "a.cu.o").stat().st_mtime_ns == made
    assert "-Xptxas=-v" in (tmp_path / "a.cu.o").read_text()


@pytest.mark.parametrize("change", ["another command", "another object", "no object", "it failed"])
def test_a_record_of_another_compile_is_not_read(compiler, tmp_path, change):
    command, target = compiler("a.cpp"), tmp_path / "a.cpp.o"
    compile_record.main(command)
    assert "-Xptxas=-v" not in target.read_text()
    assert compile_record.stored("a.cpp", command, tmp_path) is not None
    if change == "another command":
        command = compiler("a.cpp", "-O3")
    elif change == "another object":
        os.utime(target, ns=(0, target.stat().st_mtime_ns + 10**10))
    elif change == "no object":
        target.unlink()
    else:
        assert compile_record.main(compiler("a.cpp", "-fail")) == 1
    assert compile_record.stored("a.cpp", command, tmp_path) is None


def test_the_launcher_is_no_part_of_a_command(tmp_path):
    source = kernel_resources.ROOT / "csrc" / "library.cpp"
    entry = {
        "file": str(source),
        "directory": "/b",
        "command": f"python t/compile_record.py nvcc -c {source}",
    }
    (tmp_path / "all.json").write_text(json.dumps([entry]))
    assert list(kernel_resources.commands(tmp_path / "all.json")) == [
        ("csrc/library.cpp", ["nvcc", "-c", str(source)], "/b")
    ]
