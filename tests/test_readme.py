import re
import subprocess
from pathlib import Path

from conftest import of_program

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_python_of_the_readme_runs_as_pasted(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (tmp_path / "pasted.py").write_text(code)
    done = subprocess.run(**of_program(tmp_path / "pasted.py"), cwd=tmp_path, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == code.splitlines()[-1].rpartition("  # ")[2]
