from pathlib import Path
def write_run_report(run_dir: Path) -> Path:
    return run_dir
