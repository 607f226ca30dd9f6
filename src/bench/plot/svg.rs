//! Draws shapes and text in SVG, with basic features that every viewer supports.

use std::fmt::Write as _;

/// Style sheet. The fonts have similar metrics, and most systems have one of them.
const STYLE: &str = "\
text{font-family:Inter,'Segoe UI',Roboto,'Helvetica Neue',Arial,'DejaVu Sans',sans-serif;font-size:12px;fill:#24292f}\
.title{font-size:19px;font-weight:600}.head{font-size:14px;font-weight:600}.small{font-size:11px;fill:#57606a}\
.name{font-weight:600}.grid{stroke:#d8dee4;stroke-width:1}.axis{stroke:#8c959f;stroke-width:1}\
.guide{stroke:#8c959f;stroke-width:1;stroke-dasharray:2 3}.curve{fill:none;stroke-width:2;stroke-linejoin:round}";

/// Horizontal alignment of text relative to its point.
#[derive(Debug, Clone, Copy)]
pub(super) enum Anchor {
    Start,
    Middle,
    End,
}

/// A drawing under construction.
pub(super) struct Svg {
    width: f64,
    body: String,
}

impl Svg {
    /// An empty drawing of `width` pixels.
    pub(super) fn new(width: f64) -> Self {
        let body = String::new();
        Self { width, body }
    }

    /// Draws a line with a class of [`STYLE`].
    pub(super) fn line(&mut self, class: &str, [x1, y1]: [f64; 2], [x2, y2]: [f64; 2]) {
        self.add(format_args!(
            "<line class=\"{class}\" x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\"/>"
        ));
    }

    /// Draws a line through all `points`.
    pub(super) fn curve(&mut self, colour: &str, dashed: bool, points: &[[f64; 2]]) {
        let mut list = String::new();
        for [x, y] in points {
            // Writing to a `String` never fails.
            let _ = write!(list, "{x:.1},{y:.1} ");
        }
        let dash = if dashed { " stroke-dasharray=\"6 4\"" } else { "" };
        let list = list.trim_end();
        self.add(format_args!(
            "<polyline class=\"curve\" stroke=\"{colour}\"{dash} points=\"{list}\"/>"
        ));
    }

    /// Draws a rectangle, hollow or filled.
    pub(super) fn bar(&mut self, colour: &str, hollow: bool, [x, y]: [f64; 2], [width, height]: [f64; 2]) {
        let fill = if hollow { "#ffffff" } else { colour };
        self.add(format_args!(
            "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{:.1}\" height=\"{height:.1}\" rx=\"2\" fill=\"{fill}\" stroke=\"{colour}\"/>",
            width.max(1.0)
        ));
    }

    /// Draws a coloured line.
    pub(super) fn stroke(&mut self, colour: &str, [x1, y1]: [f64; 2], [x2, y2]: [f64; 2]) {
        self.add(format_args!(
            "<line stroke=\"{colour}\" stroke-width=\"1.5\" x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\"/>"
        ));
    }

    /// Draws a dot with a white rim.
    pub(super) fn dot(&mut self, colour: &str, [x, y]: [f64; 2]) {
        self.add(format_args!(
            "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"4\" fill=\"{colour}\" stroke=\"#ffffff\" stroke-width=\"1.5\"/>"
        ));
    }

    /// Draws text with a class of [`STYLE`].
    pub(super) fn text(&mut self, class: &str, anchor: Anchor, [x, y]: [f64; 2], text: &str) {
        let anchor = match anchor {
            Anchor::Start => "start",
            Anchor::Middle => "middle",
            Anchor::End => "end",
        };
        let text = escaped(text);
        self.add(format_args!(
            "<text class=\"{class}\" x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{text}</text>"
        ));
    }

    /// The finished document on a white background, with an accessible title.
    pub(super) fn finish(self, height: f64, title: &str) -> String {
        let Self { width, body } = self;
        let title = escaped(title);
        format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width:.0} {height:.0}\" width=\"{width:.0}\" \
             height=\"{height:.0}\" role=\"img\">\n<title>{title}</title>\n<style>{STYLE}</style>\n\
             <rect x=\"0.5\" y=\"0.5\" width=\"{:.0}\" height=\"{:.0}\" rx=\"8\" fill=\"#ffffff\" stroke=\"#d0d7de\"/>\n\
             {body}</svg>\n",
            width - 1.0,
            height - 1.0
        )
    }

    fn add(&mut self, shape: std::fmt::Arguments<'_>) {
        let _ = writeln!(self.body, "{shape}");
    }
}

/// Escapes markup, and replaces characters that XML forbids by spaces.
fn escaped(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            character if character.is_control() || matches!(character, '\u{fffe}' | '\u{ffff}') => escaped.push(' '),
            character => escaped.push(character),
        }
    }
    escaped
}
