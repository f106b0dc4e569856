from lorax_flax import text_table


def test_columns_are_aligned_and_nothing_trails():
  text = text_table.render(
    ("name", "n", ""),
    [("a", 1, "x"), (), ("long name", 1000, "")],
    align="lr",
    title="T",
  )
  assert text.splitlines() == [
    *("T", "name          n", "a             1  x", "", "long name  1000"),
  ]


def test_a_table_without_rows_is_its_header():
  assert text_table.render(("a", "b"), []) == "a  b"
