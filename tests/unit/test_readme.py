from pathlib import Path

from hf_hyper.bench.readme import efforts, products, section

README = (Path(__file__).parent.parent.parent / "README.md").read_text(encoding="utf-8")


def test_results_are_those_of_the_saved_json() -> None:
    assert section() in README


def test_efforts_are_points_of_error_and_speed_by_rate() -> None:
    rows = [
        {
            "kernel": f"shift {effort} {bits}",
            "bits": bits,
            "relative_mse": error * 4.0**-bits,
            "weights_per_second_by_processor_time": speed * 1e6,
            "threads": 2,
            "device": "a processor",
        }
        for bits in (4, 2)
        for effort, error, speed in (("fast", 2, 3), ("balanced", 1.5, 1), ("best", 1.25, 0.5))
    ]
    table = efforts([*rows, {"kernel": "winding fast", "bits": 6.5}]).splitlines()[-4:]
    assert table[0] == "| bits | `fast` | `balanced` | `best` |"
    assert table[2] == "| 2 | 0.125 at 3.00 M/s | 0.0938 at 1.00 M/s | 0.0781 at 0.50 M/s |"
    assert table[3].startswith("| 4 | 0.00781 at")


def test_products_are_ranges_over_shapes_by_tokens_and_accuracy() -> None:
    facts = {"bits": 4.0, "baseline": "F.linear bfloat16", "threads": 2, "device": "a processor", "isa": "avx512"}
    rows = [
        {**facts, "kernel": f"cpu.matmul_shift {accuracy}", "shape": [size, 8], "M": tokens, "ratio_median": ratio}
        for tokens, accuracy, size, ratio in (
            *((512, "exact", 8, 0.8), (512, "exact", 9, 0.99), (512, "int8", 8, 1.25), (512, "int8", 9, 1.9)),
            *((1, "exact", 8, 2.0), (1, "int8", 9, 3.0), (4, "exact", 8, 1.5)),
        )
    ]
    others = [{**rows[0], **change, "ratio_median": 9.0} for change in ({"bits": 2.0}, {"baseline": "torch int4"})]
    text = products([*rows, *others, {**rows[0], "kernel": "cpu.matmul_winding exact", "ratio_median": 9.0}])
    assert "2 shapes" in text
    assert text.splitlines()[-3:] == [
        "| 1 | 2.00 to 2.00 | 3.00 to 3.00 |",
        "| 4 | 1.50 to 1.50 | the same |",
        "| 512 | 0.80 to 0.99 | 1.25 to 1.90 |",
    ]


def test_first_shell_block_holds_the_two_commands() -> None:
    lines = README.split("```sh\n")[1].split("```")[0].splitlines()
    assert len(lines) == 2
    assert all("torch==2.13.0" in line for line in lines)
    assert lines[0].endswith("hf-hyper demo")
