//! The evidence of a trial as a picture: one SVG, drawn here because a curve, a few lines and their labels need no library.

use std::fmt::Write;

use super::trial::Trial;

const WIDTH: f64 = 860.0;
const HEIGHT: f64 = 400.0;
/// Room for labels: left, top, right, bottom.
const ROOM: [f64; 4] = [64.0, 44.0, 20.0, 44.0];
/// Points of the curve: more cannot be seen.
const POINTS: usize = 1500;

/// Draws ln W against the prompts, the bar, the line of futility and the nights. `points` are (night, ln W) of each step.
pub fn evidence(trial: &Trial, points: &[(u32, f64)]) -> String {
    let (bar, futility) = (trial.bar(), trial.settings().futility);
    let values = points.iter().map(|(_, w)| *w);
    let low = values.clone().fold(futility, f64::min) - 0.5;
    let high = values.fold(bar, f64::max) + 0.5;
    let frame = Frame { steps: points.len().max(1) as f64, low, high };
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" font-family=\"sans-serif\" \
         font-size=\"12\" role=\"img\">\n<title>{}</title>\n<rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n",
        escape(&format!("Evidence of trial {}", trial.id()))
    );
    let facts = trial.facts();
    let title = format!("{} against {}: {}", facts.challenger, facts.incumbent, trial.state().as_str());
    text(&mut svg, (ROOM[0], 24.0), "start", &title);
    for tick in ticks(low, high) {
        frame.level(&mut svg, tick, "#eee", "");
        text(&mut svg, (ROOM[0] - 8.0, frame.y(tick) + 4.0), "end", &format!("{tick}"));
    }
    for (step, pair) in (1..).zip(points.windows(2)) {
        if pair[0].0 != pair[1].0 {
            let x = frame.x(f64::from(step));
            line(&mut svg, [x, ROOM[1], x, HEIGHT - ROOM[3]], "#ccc", "");
            text(&mut svg, (x + 4.0, ROOM[1] + 12.0), "start", &format!("night {}", pair[1].0));
        }
    }
    frame.level(&mut svg, bar, "#2a7", "6 4");
    text(
        &mut svg,
        (WIDTH - ROOM[2], frame.y(bar) - 6.0),
        "end",
        &format!("bar: ln W = {bar:.2}, W = {:.0}", bar.exp()),
    );
    frame.level(&mut svg, futility, "#c33", "6 4");
    text(&mut svg, (WIDTH - ROOM[2], frame.y(futility) + 14.0), "end", &format!("futility: {futility}"));
    curve(&mut svg, &frame, points);
    let footer =
        format!("{} fresh prompts in {} nights; ln W is the logarithm of the wealth", trial.steps(), trial.nights());
    text(&mut svg, (WIDTH / 2.0, HEIGHT - 14.0), "middle", &footer);
    svg.push_str("</svg>\n");
    svg
}

/// Where numbers lie in the picture.
struct Frame {
    steps: f64,
    low: f64,
    high: f64,
}

impl Frame {
    fn x(&self, step: f64) -> f64 {
        ROOM[0] + step / self.steps * (WIDTH - ROOM[0] - ROOM[2])
    }

    fn y(&self, value: f64) -> f64 {
        ROOM[1] + (self.high - value) / (self.high - self.low) * (HEIGHT - ROOM[1] - ROOM[3])
    }

    fn level(&self, svg: &mut String, value: f64, colour: &str, dash: &str) {
        line(svg, [ROOM[0], self.y(value), WIDTH - ROOM[2], self.y(value)], colour, dash);
    }
}

/// Draws the curve; of many steps those that fit, and always the last.
fn curve(svg: &mut String, frame: &Frame, points: &[(u32, f64)]) {
    let every = points.len().div_ceil(POINTS).max(1);
    let mut path = format!("M{:.1} {:.1}", frame.x(0.0), frame.y(0.0));
    for (index, (_, value)) in points.iter().enumerate() {
        if (index + 1) % every == 0 || index + 1 == points.len() {
            add(&mut path, format_args!(" L{:.1} {:.1}", frame.x(index as f64 + 1.0), frame.y(*value)));
        }
    }
    add(svg, format_args!("<path d=\"{path}\" fill=\"none\" stroke=\"#26c\" stroke-width=\"1.5\"/>\n"));
}

/// Returns round values between two numbers, at most about eight.
fn ticks(low: f64, high: f64) -> Vec<f64> {
    let step = [1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0].into_iter().find(|s| (high - low) / s <= 8.0).unwrap_or(500.0);
    let first = (low / step).ceil() as i64;
    let last = (high / step).floor() as i64;
    (first..=last).map(|k| k as f64 * step).collect()
}

fn line(svg: &mut String, [x1, y1, x2, y2]: [f64; 4], colour: &str, dash: &str) {
    add(
        svg,
        format_args!(
            "<line x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\" stroke=\"{colour}\" stroke-dasharray=\"{dash}\"/>\n"
        ),
    );
}

fn text(svg: &mut String, (x, y): (f64, f64), anchor: &str, words: &str) {
    add(svg, format_args!("<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{}</text>\n", escape(words)));
}

/// Appends to a string, which cannot fail.
fn add(out: &mut String, words: std::fmt::Arguments<'_>) {
    out.write_fmt(words).unwrap_or_default();
}

fn escape(words: &str) -> String {
    words.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::super::trial::tests::{Driven, better, opening, settings};
    use super::*;

    #[test]
    fn the_picture_holds_the_whole_curve_and_is_well_formed() {
        let opening = crate::gate::Opening { challenger: "a<b>&\"c".into(), ..opening() };
        let mut driven = Driven::open(opening, &[], &settings());
        driven.night(20, better);
        driven.night(20, better);
        let points: Vec<(u32, f64)> = driven.steps.iter().map(|s| (s.night, s.ln_wealth)).collect();
        let svg = evidence(&driven.trial, &points);
        assert_eq!(svg.matches(" L").count(), points.len(), "{svg}");
        assert!(svg.contains("night 2") && svg.contains("W = 1200") && svg.contains("a&lt;b&gt;&amp;&quot;c"), "{svg}");
        assert_eq!(svg.matches('<').count(), svg.matches('>').count());
        let none = evidence(&driven.trial, &[]);
        assert!(none.contains("<path d=\"M64.0") && !none.contains("NaN"), "{none}");
    }

    #[test]
    fn many_steps_are_thinned_and_the_last_stays() {
        let driven = Driven::open(opening(), &[], &settings());
        let points: Vec<(u32, f64)> = (0..10_000).map(|i| (1, f64::from(i) / 1000.0)).collect();
        let svg = evidence(&driven.trial, &points);
        assert!((1000..=POINTS + 1).contains(&svg.matches(" L").count()));
        assert!(svg.contains(&format!(" L{:.1} ", WIDTH - ROOM[2])));
    }

    #[test]
    fn ticks_are_round_and_few() {
        assert_eq!(ticks(-2.5, 7.6), [-2.0, 0.0, 2.0, 4.0, 6.0]);
        assert!(ticks(-2.5, 900.0).len() <= 9);
    }
}
