//! Pictures, drawn by plotters as SVG. It writes fixed colours; each stands for a name that the style sheet gives a colour for
//! light and dark (`[fill="#030303"]` and so on), since a picture inside the page follows its style.

use plotters::chart::MeshStyle;
use plotters::prelude::*;

/// Axes and words.
const WORDS: RGBColor = RGBColor(1, 1, 1);
/// Lines of the grid.
const GRID: RGBColor = RGBColor(2, 2, 2);
/// What is new.
const NEW: RGBColor = RGBColor(3, 3, 3);
/// The bar that decides.
const BAR: RGBColor = RGBColor(4, 4, 4);
/// What was before.
const OLD: RGBColor = RGBColor(5, 5, 5);

/// A picture for a wide and one for a narrow window: text that is scaled down cannot be read.
const SIZES: [(&str, (u32, u32)); 2] = [("for-wide", (860, 300)), ("for-narrow", (360, 260))];

type Drawn = Result<(), Box<dyn std::error::Error>>;

/// Returns the evidence after each fresh prompt, and the bar at which it decides.
pub(super) fn evidence(points: &[(f64, f64)], bar: f64) -> String {
    let last = points.last().map_or(1.0, |point| point.0).max(1.0);
    let all = points.iter().map(|point| point.1).chain([0.0, bar]);
    let (low, high) = all.fold((f64::MAX, f64::MIN), |(low, high), y| (low.min(y), high.max(y)));
    let room = (high - low).max(1.0) * 0.08;
    let words = format!(
        "Evidence after each of {} fresh prompts; it ends at {:.2}, the bar is {bar:.2}",
        points.len(),
        points.last().map_or(0.0, |p| p.1)
    );
    draw(&words, |area| {
        let mut chart = ChartBuilder::on(area)
            .margin(8)
            .x_label_area_size(38)
            .y_label_area_size(46)
            .build_cartesian_2d(0.0..last, low - room..high + room)?;
        mesh(chart.configure_mesh(), "fresh prompts", "evidence (ln wealth)")?;
        chart.draw_series(DashedLineSeries::new([(0.0, bar), (last, bar)], 7, 5, BAR.stroke_width(2)))?;
        chart.draw_series(LineSeries::new(
            [(0.0, 0.0)].into_iter().chain(points.iter().copied()),
            NEW.stroke_width(2),
        ))?;
        Ok(())
    })
}

/// Returns how two groups of rewards are distributed over [0, 1], each as shares of its own total.
pub(super) fn distribution(before: &[u64], after: &[u64], words: &str) -> String {
    let shares = |bins: &[u64]| -> Vec<f64> {
        let total = bins.iter().sum::<u64>().max(1) as f64;
        bins.iter().map(|count| *count as f64 / total).collect()
    };
    let (before, after) = (shares(before), shares(after));
    let high = before.iter().chain(&after).copied().fold(0.05, f64::max) * 1.08;
    let width = 1.0 / before.len().max(after.len()).max(1) as f64;
    draw(words, |area| {
        let mut chart = ChartBuilder::on(area)
            .margin(8)
            .x_label_area_size(38)
            .y_label_area_size(46)
            .build_cartesian_2d(0.0..1.0, 0.0..high)?;
        mesh(chart.configure_mesh(), "reward", "share of answers")?;
        for (shares, colour, from) in [(&before, OLD, 0.1), (&after, NEW, 0.5)] {
            let bar = |(index, share): (usize, &f64)| {
                let left = (index as f64 + from) * width;
                Rectangle::new([(left, 0.0), (left + 0.4 * width, *share)], colour.filled())
            };
            chart.draw_series(shares.iter().enumerate().filter(|(_, share)| **share > 0.0).map(bar))?;
        }
        Ok(())
    })
}

/// Counts rewards in twentieths of [0, 1].
pub(super) fn bins(rewards: impl Iterator<Item = f64>) -> Vec<u64> {
    let mut bins = vec![0; crate::round::answers::BINS];
    let last = bins.len() - 1;
    for reward in rewards {
        // A reward is in [0, 1]; what is not is at an end.
        bins[((reward * (last + 1) as f64).floor().max(0.0) as usize).min(last)] += 1;
    }
    bins
}

fn mesh<DB: DrawingBackend>(
    mut mesh: MeshStyle<'_, '_, Ranged, Ranged, DB>,
    x: &str,
    y: &str,
) -> Result<(), DrawingAreaErrorKind<DB::ErrorType>> {
    let text = ("sans-serif", 13).into_font().color(&WORDS);
    mesh.disable_x_mesh()
        .max_light_lines(0)
        .bold_line_style(GRID)
        .axis_style(GRID)
        .label_style(text.clone())
        .axis_desc_style(text)
        .x_labels(6)
        .y_labels(5)
        .x_desc(x)
        .y_desc(y)
        .draw()
}

type Ranged = plotters::coord::types::RangedCoordf64;

/// Draws both sizes of a picture, each with the words for those who do not see it.
fn draw(words: &str, picture: impl Fn(&DrawingArea<SVGBackend<'_>, plotters::coord::Shift>) -> Drawn) -> String {
    let mut all = String::new();
    for (class, size) in SIZES {
        let mut svg = String::new();
        let drawn = {
            let area = SVGBackend::with_string(&mut svg, size).into_drawing_area();
            picture(&area).and_then(|()| Ok(area.present()?))
        };
        match drawn {
            Ok(()) => {
                let label = minijinja::HtmlEscape(words);
                all.push_str(&svg.replacen(
                    "<svg ",
                    &format!("<svg class=\"{class}\" role=\"img\" aria-label=\"{label}\" "),
                    1,
                ));
            }
            Err(error) => tracing::error!(%error, words, "a picture cannot be drawn"),
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_picture_has_words_and_only_colours_that_the_style_knows() {
        let points: Vec<(f64, f64)> = (1..=40).map(|step| (f64::from(step), f64::from(step) * 0.2 - 1.0)).collect();
        let style = include_str!("templates/style.css");
        for svg in [evidence(&points, 7.09), evidence(&[], 7.09), distribution(&[1, 2, 3], &[3, 2, 1], "a <b> \"c\"")] {
            assert_eq!(svg.matches("<svg class=").count(), 2, "{svg}");
            assert_eq!(svg.matches("role=\"img\" aria-label=").count(), 2);
            assert!(!svg.contains("style=") && !svg.contains("<b>"), "{svg}");
            for colour in svg.split("\"#").skip(1).filter_map(|rest| rest.split('"').next()) {
                assert!(style.contains(&format!("[fill=\"#{colour}\"]")), "#{colour} has no name in the style");
            }
        }
    }

    #[test]
    fn rewards_fall_into_the_bin_that_they_belong_to() {
        let bins = bins([0.0, 0.049, 0.05, 0.5, 0.999, 1.0, 1.5, -1.0, f64::NAN].into_iter());
        assert_eq!((bins.len(), bins[0], bins[1], bins[10], bins[19]), (20, 4, 1, 1, 3));
    }
}
