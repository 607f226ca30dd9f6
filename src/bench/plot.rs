//! Plots a report as SVG, optionally compared with another: latency, time of each step, and throughput.
//!
//! Each run has one colour in all sections. The compared run has the same colour, dashed or hollow. The palette by
//! Okabe and Ito is safe for colour-blind readers.

use std::time::Duration;

use super::{
    report::{BenchKind, BenchReport, Row},
    sample::{Distribution, Throughput, TimedStep},
};
use crate::humanize::{megabytes, thousands, time};

mod axis;
mod svg;

use axis::{Linear, LogTime};
use svg::{Anchor, Svg};

const WIDTH: f64 = 980.0;
/// Left and right edge of the plot area. Axis labels are left of it, the legend is right of it.
const PLOT_X: [f64; 2] = [104.0, 716.0];
const LEGEND: f64 = 744.0;
/// Space from the bottom of a section to the heading of the next.
const SECTION_GAP: f64 = 76.0;
/// Colours of the runs, repeated.
const COLOURS: [&str; 7] = [
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#555555",
];
/// Maximum characters of a heading line.
const MAX_HEADING_CHARS: usize = 150;
/// Maximum points of a throughput curve.
const MAX_CURVE_POINTS: usize = 60;

/// One run in the figure.
struct Series<'a> {
    row: &'a Row,
    colour: &'static str,
    /// Whether the run belongs to the compared report.
    is_other: bool,
}

/// Plots `report` as SVG, compared with `other`.
pub fn plot(report: &BenchReport, other: Option<&BenchReport>) -> String {
    let series = series(report, other);
    let mut svg = Svg::new(WIDTH);
    let mut y = heading(&mut svg, report, other);
    y = latency(&mut svg, y, report.kind, &series) + SECTION_GAP;
    if report.kind == BenchKind::Fetch {
        y = phases(&mut svg, y, &series) + SECTION_GAP;
    }
    if series.iter().any(|series| series.row.bytes > 0) {
        y = throughput(&mut svg, y, &series) + SECTION_GAP;
    }
    let machine = &report.machine;
    let foot = format!(
        "nydus-store {} bench {} on {} ({} cores, {}), {}",
        report.version,
        report.kind.name(),
        machine.name,
        machine.cores,
        machine.kernel,
        report.time
    );
    svg.text("small", Anchor::Start, [28.0, y - 14.0], &shortened(&foot));
    svg.finish(
        y + 6.0,
        &format!("bench {} of {}", report.kind.name(), report.subject.name),
    )
}

/// All runs with measurements, each followed by the compared run of the same name.
fn series<'a>(report: &'a BenchReport, other: Option<&'a BenchReport>) -> Vec<Series<'a>> {
    let colours = COLOURS.iter().cycle();
    let pair = |(row, colour): (&'a Row, &&'static str)| {
        let there = other.and_then(|other| other.rows.iter().find(|there| there.name == row.name));
        let series = |row, is_other| Series { row, colour, is_other };
        [Some(series(row, false)), there.map(|row| series(row, true))]
    };
    let all = report.rows.iter().zip(colours).flat_map(pair).flatten();
    all.filter(|series: &Series| series.row.operations > 0).collect()
}

/// Draws the title. Returns the top of the first section.
fn heading(svg: &mut Svg, report: &BenchReport, other: Option<&BenchReport>) -> f64 {
    let subject = &report.subject;
    let (title, mut lines) = match report.kind {
        BenchKind::Fetch => {
            let from = subject.from.as_deref().unwrap_or(&subject.name);
            let host = from.split('/').next().unwrap_or(from);
            (format!("Fetching chunks from {host}"), vec![described(report)])
        }
        BenchKind::Read => (format!("Reading {}", subject.name), vec![described(report)]),
    };
    if let Some(other) = other {
        lines.push(format!(
            "Solid: this run. Dashed and hollow: {}, {}",
            other.time,
            described(other)
        ));
    }
    svg.text("title", Anchor::Start, [28.0, 40.0], &shortened(&title));
    let mut y = 62.0;
    for line in lines {
        svg.text("small", Anchor::Start, [28.0, y], &shortened(&line));
        y += 17.0;
    }
    y + 24.0
}

fn described(report: &BenchReport) -> String {
    let subject = &report.subject;
    let setting = |key: &str| {
        let value = report.settings.get(key)?.as_str()?;
        Some(format!("{} {value}", key.replace('_', " ")))
    };
    let image = subject.image.map(|image| format!("image {}", &image.to_string()[..19]));
    let parts = [
        Some(subject.name.clone()),
        image,
        subject.file_system.clone(),
        setting("order"),
        setting("drop_caches"),
    ];
    parts.into_iter().flatten().collect::<Vec<_>>().join(", ")
}

/// Draws the cumulative distribution of latency. Returns the section's bottom.
fn latency(svg: &mut Svg, top: f64, kind: BenchKind, series: &[Series]) -> f64 {
    let operation = match kind {
        BenchKind::Fetch => "request",
        BenchKind::Read => "operation",
    };
    head(
        svg,
        top,
        &format!("Time per {operation}"),
        &format!("cumulative share of {operation}s"),
    );
    let top = top + 16.0;
    let bottom = top + (series.len() as f64 * 38.0).max(230.0);
    let at = |share: f64| bottom - share * (bottom - top);
    let totals: Vec<_> = series.iter().filter_map(|series| series.row.total()).collect();
    let scale = LogTime::new(ends(&totals), PLOT_X);
    time_axis(svg, &scale, [top, bottom]);
    for (share, name, class) in [
        (0.0, "0 %", "axis"),
        (0.25, "25 %", "grid"),
        (0.5, "median", "guide"),
        (0.75, "75 %", "grid"),
        (0.9, "90 %", "guide"),
        (0.99, "99 %", "guide"),
    ] {
        svg.line(class, [PLOT_X[0], at(share)], [PLOT_X[1], at(share)]);
        svg.text("", Anchor::End, [PLOT_X[0] - 10.0, at(share) + 4.0], name);
    }
    for Series { row, colour, is_other } in series.iter().rev() {
        let Some(total) = row.total() else { continue };
        svg.curve(colour, *is_other, &steps(total, |time| scale.at(time), at));
    }
    for Series { row, colour, .. } in series.iter().rev() {
        for percent in [50.0, 90.0, 99.0] {
            if let Some(total) = row.total() {
                svg.dot(colour, [scale.at(total.percentile(percent)), at(percent / 100.0)]);
            }
        }
    }
    for (number, series) in series.iter().enumerate() {
        legend(svg, top + 14.0 + number as f64 * 38.0, kind, series);
    }
    bottom
}

fn legend(svg: &mut Svg, y: f64, kind: BenchKind, series: &Series) {
    let Series { row, colour, is_other } = series;
    svg.curve(colour, *is_other, &[[LEGEND, y - 4.0], [LEGEND + 26.0, y - 4.0]]);
    let name = match (is_other, kind) {
        (true, _) => format!("{}, compared", row.name),
        (false, BenchKind::Fetch) => format!("{}: {} MB/s", row.name, megabytes(row.per_second(row.bytes))),
        (false, BenchKind::Read) if row.bytes == 0 => {
            format!("{}: {} /s", row.name, thousands(row.per_second(row.operations) as u64))
        }
        (false, BenchKind::Read) => format!("{}: {} MB/s", row.name, megabytes(row.per_second(row.bytes))),
    };
    svg.text("name", Anchor::Start, [LEGEND + 36.0, y], &name);
    let told = row.total().map(|total| {
        let [median, slow] = [50.0, 99.0].map(|percent| time(total.percentile(percent)));
        format!("median {median}, 99 % {slow}")
    });
    svg.text(
        "small",
        Anchor::Start,
        [LEGEND + 36.0, y + 15.0],
        &told.unwrap_or_default(),
    );
}

/// The points of a step curve of a cumulative distribution. Leaves out steps below one pixel.
fn steps(times: &Distribution, x: impl Fn(Duration) -> f64, y: impl Fn(f64) -> f64) -> Vec<[f64; 2]> {
    let mut points = vec![[x(times.min()), y(0.0)]];
    for (time, share) in times.shares() {
        let (to, [from_x, from_y]) = ([x(time), y(share)], points[points.len() - 1]);
        if share == 1.0 || to[0] - from_x >= 1.0 || from_y - to[1] >= 1.0 {
            points.extend([[to[0], from_y], to]);
        }
    }
    points
}

/// Draws the time of each step. Returns the section's bottom.
fn phases(svg: &mut Svg, top: f64, series: &[Series]) -> f64 {
    const LANE: f64 = 14.0;
    head(
        svg,
        top,
        "Where the time goes",
        "bar: middle half of requests, dot: median, line: fastest to 99 %",
    );
    let top = top + 16.0;
    let parts = TimedStep::ALL.into_iter().filter(|phase| *phase != TimedStep::Total);
    let shown: Vec<_> = parts
        .filter(|phase| series.iter().any(|series| series.row.latency.contains_key(phase)))
        .collect();
    let all: Vec<_> = shown
        .iter()
        .flat_map(|phase| series.iter().filter_map(|series| series.row.latency.get(phase)))
        .collect();
    let scale = LogTime::new(ends(&all), PLOT_X);
    let height = series.len() as f64 * LANE + 14.0;
    let bottom = top + shown.len() as f64 * height;
    time_axis(svg, &scale, [top, bottom]);
    for (number, phase) in shown.iter().enumerate() {
        let top = top + number as f64 * height;
        svg.line("grid", [PLOT_X[0], top], [PLOT_X[1], top]);
        svg.text(
            "",
            Anchor::End,
            [PLOT_X[0] - 10.0, top + height / 2.0 + 4.0],
            phase.name(),
        );
        for (lane, Series { row, colour, is_other }) in series.iter().enumerate() {
            let Some(took) = row.latency.get(phase) else { continue };
            let y = top + 7.0 + (lane as f64 + 0.5) * LANE;
            let at = |percent| scale.at(took.percentile(percent));
            svg.stroke(colour, [scale.at(took.min()), y], [at(99.0), y]);
            svg.bar(colour, *is_other, [at(25.0), y - 4.0], [at(75.0) - at(25.0), 8.0]);
            svg.dot(colour, [at(50.0), y]);
        }
    }
    svg.line("axis", [PLOT_X[0], bottom], [PLOT_X[1], bottom]);
    bottom
}

/// Draws throughput over time. Returns the section's bottom.
fn throughput(svg: &mut Svg, top: f64, series: &[Series]) -> f64 {
    head(svg, top, "Throughput", "MB/s");
    let (top, bottom) = (top + 16.0, top + 166.0);
    let with_bytes: Vec<_> = series.iter().filter(|series| series.row.bytes > 0).collect();
    let curves: Vec<_> = with_bytes
        .iter()
        .map(|series| rates(&series.row.throughput, series.row.seconds))
        .collect();
    let most = curves.iter().flatten().map(|[_, rate]| *rate).fold(0.0, f64::max);
    let longest = with_bytes.iter().map(|series| series.row.seconds).fold(0.0, f64::max);
    let (x, y) = (
        Linear::ending_at(longest, 8.0, PLOT_X),
        Linear::new(most, 4.0, [bottom, top]),
    );
    for (place, name) in y.ticks() {
        let class = if place == bottom { "axis" } else { "grid" };
        svg.line(class, [PLOT_X[0], place], [PLOT_X[1], place]);
        svg.text("", Anchor::End, [PLOT_X[0] - 10.0, place + 4.0], &name);
    }
    for (place, name) in x.ticks() {
        svg.line("axis", [place, bottom], [place, bottom + 4.0]);
        svg.text("", Anchor::Middle, [place, bottom + 18.0], &name);
    }
    svg.text(
        "small",
        Anchor::Middle,
        [(PLOT_X[0] + PLOT_X[1]) / 2.0, bottom + 36.0],
        "seconds since the start of the run",
    );
    for (series, curve) in with_bytes.iter().zip(&curves).rev() {
        let points: Vec<_> = curve.iter().map(|[at, rate]| [x.at(*at), y.at(*rate)]).collect();
        svg.curve(series.colour, series.is_other, &points);
    }
    bottom
}

/// The points of a throughput curve: time in seconds and rate in MB/s.
fn rates(throughput: &Throughput, seconds: f64) -> Vec<[f64; 2]> {
    let Throughput { interval_ms, bytes } = throughput;
    let together = bytes.len().div_ceil(MAX_CURVE_POINTS).max(1);
    let width = (*interval_ms as f64 / 1000.0) * together as f64;
    let point = |(number, bytes): (usize, &[u64])| {
        let start = number as f64 * width;
        // The last interval is shorter. It is left out if it is too short to be significant.
        let length = width.min(seconds - start).max(0.001);
        let rate = bytes.iter().sum::<u64>() as f64 / length / 1e6;
        (number == 0 || length > width / 2.0).then_some([start + length / 2.0, rate])
    };
    let mut points: Vec<_> = bytes.chunks(together).enumerate().filter_map(point).collect();
    // Extends the curve to both ends, so that it has at least two points.
    if let (Some(first), Some(last)) = (points.first().copied(), points.last().copied()) {
        points.insert(0, [0.0, first[1]]);
        points.push([seconds, last[1]]);
    }
    points
}

fn head(svg: &mut Svg, y: f64, title: &str, explained: &str) {
    svg.text("head", Anchor::Start, [28.0, y], title);
    svg.text("small", Anchor::End, [PLOT_X[1], y], explained);
}

/// Draws vertical lines at round times, with labels.
fn time_axis(svg: &mut Svg, scale: &LogTime, [top, bottom]: [f64; 2]) {
    for (x, name) in scale.ticks() {
        svg.line("grid", [x, top], [x, bottom]);
        svg.text("", Anchor::Middle, [x, bottom + 18.0], &name);
    }
}

/// The minimum and maximum of all distributions.
fn ends(all: &[&Distribution]) -> [Duration; 2] {
    let least = all.iter().map(|times| times.min()).min();
    let most = all.iter().map(|times| times.max()).max();
    [
        least.unwrap_or(Duration::from_millis(1)),
        most.unwrap_or(Duration::from_secs(1)),
    ]
}

fn shortened(text: &str) -> String {
    if text.chars().count() <= MAX_HEADING_CHARS {
        return text.to_owned();
    }
    text.chars().take(MAX_HEADING_CHARS - 1).chain(['…']).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::bench::{report::Subject, sample::Samples};

    fn report(kind: BenchKind, rows: usize) -> BenchReport {
        let subject = Subject {
            name: "a<b> & \u{1}c".to_owned(),
            image: None,
            from: None,
            file_system: None,
        };
        let mut report = BenchReport::new(kind, subject, BTreeMap::new());
        for row in 0..rows {
            let mut samples = Samples::start();
            for _ in 0..row {
                samples.succeeded(
                    10,
                    [(TimedStep::Total, Duration::ZERO), (TimedStep::Verify, Duration::MAX)],
                );
            }
            samples.elapsed = Duration::ZERO;
            report
                .rows
                .push(Row::new(format!("{row} × chunk"), row, false, &samples));
        }
        report
    }

    #[test]
    fn plots_of_any_report_are_well_formed() {
        for kind in [BenchKind::Fetch, BenchKind::Read] {
            for rows in [0, 1, 2, 20] {
                let report = report(kind, rows);
                for other in [None, Some(&report)] {
                    let svg = plot(&report, other);
                    let document = roxmltree::Document::parse(&svg).unwrap();
                    let texts = document.descendants().filter(|node| node.has_tag_name("text"));
                    assert!(
                        texts
                            .filter_map(|node| node.text())
                            .any(|text| text.contains("a<b> &  c"))
                    );
                    assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
                    assert_eq!(svg.contains("compared"), rows > 1 && other.is_some());
                }
            }
        }
    }
}
