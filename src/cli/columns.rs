//! Tables for terminals.

/// Formats rows with aligned columns, each row on a line of its own.
pub(super) fn columns<const N: usize>(rows: &[[String; N]]) -> String {
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max();
    let widths: [usize; N] = std::array::from_fn(|column| width(column).unwrap_or_default());
    let line = |row: &[String; N]| {
        let cells = row.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}"));
        format!("{}\n", cells.collect::<Vec<_>>().join("  ").trim_end())
    };
    rows.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::columns;

    #[test]
    fn cells_of_a_column_begin_below_each_other() {
        let rows = [["A", "B", "C"], ["long", "é", ""]].map(|row| row.map(str::to_owned));
        assert_eq!(columns(&rows), "A     B  C\nlong  é\n");
    }
}
