"""Builds fastpg._C (and fastpg._cuda, given CUDA sources and an nvcc) with ninja, without torch.

Both are modules of Python's stable ABI: built once, they serve Python 3.10 and every later version.

CXX                    the compiler: GCC 11 or later, or clang; on Windows clang or MinGW
FASTPG_CUDA=auto|0|1   use nvcc when found (auto), never (0), or fail without it (1)
FASTPG_STRICT=1        a failed build stops the installation; else fastpg runs on its references
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import ninja
from ninja.ninja_syntax import Writer
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# Such as linux-x86_64, macosx-11.0-arm64, win-amd64. _PYTHON_HOST_PLATFORM may name another system
# than this one; CXX is a compiler for that then.
TARGET = sysconfig.get_platform()
WINDOWS = TARGET.startswith("win")
# -fno-trapping-math lets GCC turn the selects of csrc/simd into masks, and -fno-tree-pre keeps it
# from splitting a loop at a select of a constant: without either, such a loop would be scalar, ten
# times slower. clang refuses the latter.
FLAGS_OF_GCC = ["-fno-tree-pre"]
CXXFLAGS = [
    *("-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-Wall", "-Wextra"),
    *("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),
]
if not WINDOWS:
    CXXFLAGS.append("-fPIC")
SHARED = {
    "macosx": ["-bundle", "-undefined", "dynamic_lookup"],
    "win": ["-shared", "-static", f"-L{sys.base_prefix}/libs", "-lpython3"],
}.get(TARGET.partition("-")[0], ["-shared"])
# A Python that is a universal2 of macOS gets what this machine takes.
MACHINE = platform.machine() if TARGET.endswith("universal2") else TARGET
X86 = MACHINE.endswith(("x86_64", "amd64"))
# A file `<op>_simd.cpp` is compiled once for each of these.
ISA_FLAGS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": [
        *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma"),
        "-mprefer-vector-width=512",
    ],
}
NVCCFLAGS = ["-O3", "-std=c++17", "-lineinfo", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
# The machine code is for A100; RTX 30; RTX 40 and L4; H100 and H200; B200; RTX 50.
# For every other GPU from Turing on, the driver compiles the PTX when a kernel is first used.
GPUS = (80, 86, 89, 90, 100, 120)
GENCODE = [f"-gencode=arch=compute_{gpu},code=sm_{gpu}" for gpu in GPUS]
GENCODE += ["-gencode=arch=compute_75,code=compute_75"]
FILE_FLAGS = {"bind_cuda": [f"-DFPG_GPUS='\"{' '.join(f'sm_{g}' for g in GPUS)}\"'"]}


def find_nvcc():
    """The nvcc to use, or None; FASTPG_CUDA decides."""
    wanted = os.environ.get("FASTPG_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        sys.exit(f"FASTPG_CUDA must be auto, 0 or 1, not {wanted!r}")
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    found = next((f"{h}/bin/nvcc" for h in homes if h and Path(h, "bin/nvcc").exists()), None)
    # On Windows nvcc takes MSVC alone, which does not know these flags.
    nvcc = None if WINDOWS else found or shutil.which("nvcc")
    if wanted == "1" and not nvcc:
        sys.exit("FASTPG_CUDA=1, but nvcc was not found: set CUDA_HOME")
    return None if wanted == "0" else nvcc


def is_clang(cxx):
    """Whether a compiler is clang."""
    asked = subprocess.run(f"{cxx} --version", shell=True, capture_output=True, text=True)
    return "clang" in asked.stdout


def joined(words):
    """Words as one command line of this system's shell."""
    return subprocess.list2cmdline(words) if WINDOWS else shlex.join(words)


def sources(suffix):
    """The files of csrc/ with this suffix."""
    return sorted(str(f) for f in Path("csrc").rglob(f"*{suffix}"))


def variants(source):
    """What a source is compiled to: the suffix of each object, and the flags it takes."""
    if not source.stem.endswith("_simd"):
        return {"": FILE_FLAGS.get(source.stem, [])}
    sets = ISA_FLAGS if X86 else ["baseline"]
    return {f".{isa}": [f"-DFPG_ISA={isa}", *ISA_FLAGS[isa]] for isa in sets}


class Build(build_ext):
    """Compiles one extension through ninja; each instruction set's file gets its own flags."""

    def build_extension(self, ext):
        try:
            self.ninja(ext)
        except (OSError, subprocess.CalledProcessError) as error:
            if os.environ.get("FASTPG_STRICT") == "1":
                raise
            ext.optional = True
            print(f"fastpg: {ext.name} was NOT built ({error})", file=sys.stderr)

    def copy_extensions_to_source(self):
        """For an editable install. A module for one Python, of an earlier build, would go first."""
        for ext in self.extensions:
            for earlier in Path().glob(f"{ext.name.replace('.', '/')}.cpython-*"):
                earlier.unlink()
        super().copy_extensions_to_source()

    def ninja(self, ext):
        # Not in self.build_temp: an editable install has a new one each time, and a wheel another.
        # In the same folder ninja compiles again what has changed, its command included.
        folder = Path("build/ninja", ext.name)
        folder.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).absolute()
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(folder / "build.ninja", "w") as file:
            self.write(Writer(file, width=1000), ext, folder.absolute(), target)
        subprocess.run([os.path.join(ninja.BIN_DIR, "ninja"), "-C", str(folder)], check=True)

    def write(self, out, ext, folder, target):
        """The whole build: a rule per compiler, an edge per source, one link."""
        cxx, nvcc = os.environ.get("CXX", "clang++" if WINDOWS else "c++"), find_nvcc()
        folders = (*ext.include_dirs, *self.include_dirs, Path("csrc").absolute())
        includes = [joined([f"-I{folder}"]) for folder in folders]
        flags = CXXFLAGS + ([] if is_clang(cxx) else FLAGS_OF_GCC)
        out.variable("includes", includes)
        for rule, command in (
            ("cxx", f"{cxx} {' '.join(flags)} $flags $includes -MMD -MF $out.d"),
            ("nvcc", f"{nvcc} {' '.join(NVCCFLAGS + GENCODE)} $includes -MD"),
        ):
            out.rule(rule, f"{command} -c $in -o $out", depfile="$out.d", deps="gcc")
        out.rule("link", f"{cxx} $in {joined(SHARED)} -o $out")
        # The static runtime: no CUDA library is needed to import the module.
        out.rule("link_cuda", f"{nvcc} -shared -cudart static $in -o $out")
        objects = []
        for source in map(Path, ext.sources):
            rule = "nvcc" if source.suffix == ".cu" else "cxx"
            for name, flags in variants(source).items():
                objects.append(str(folder / f"{source.stem}{name}{source.suffix}.o"))
                out.build(objects[-1], rule, str(source.absolute()), variables={"flags": flags})
        cuda = any(source.endswith(".cu") for source in ext.sources)
        out.build(str(target), "link_cuda" if cuda else "link", objects)


def extensions():
    """fastpg._C, and fastpg._cuda where there are CUDA sources and an nvcc."""
    cuda, nvcc = sources(".cu"), find_nvcc()
    cpu = [f for f in sources(".cpp") if Path(f).stem != "bind_cuda"]
    found = [Extension("fastpg._C", cpu, py_limited_api=True)]
    if cuda and nvcc:
        found.append(Extension("fastpg._cuda", [*cuda, "csrc/bind_cuda.cpp"], py_limited_api=True))
    return found


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": Build},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
