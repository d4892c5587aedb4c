//! The evidence of a trial as a picture in a file of its own, drawn by plotters as SVG.

use plotters::prelude::*;

use super::trial::Trial;

const SIZE: (u32, u32) = (860, 400);
const WORDS: RGBColor = RGBColor(0x22, 0x22, 0x22);
const GRID: RGBColor = RGBColor(0xdd, 0xdd, 0xdd);
const CURVE: RGBColor = RGBColor(0x22, 0x66, 0xcc);
const BAR: RGBColor = RGBColor(0x22, 0x88, 0x55);
const FUTILITY: RGBColor = RGBColor(0xbb, 0x33, 0x33);

/// Draws ln W against the prompts, the bar, the line of futility and the nights. `points` are (night, ln W) of each step.
///
/// Returns the document, or why the library cannot draw it.
pub fn evidence(trial: &Trial, points: &[(u32, f64)]) -> Result<String, String> {
    let mut svg = String::new();
    let area = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
    draw(&area, trial, points).and_then(|()| Ok(area.present()?)).map_err(|error| error.to_string())?;
    drop(area);
    Ok(svg)
}

fn draw(
    area: &DrawingArea<SVGBackend<'_>, plotters::coord::Shift>,
    trial: &Trial,
    points: &[(u32, f64)],
) -> Result<(), Box<dyn std::error::Error>> {
    let (bar, futility) = (trial.bar(), trial.settings().futility);
    let values = points.iter().map(|(_, w)| *w);
    let (low, high) = (values.clone().fold(futility, f64::min) - 0.5, values.fold(bar, f64::max) + 0.5);
    let last = points.len().max(1) as f64;
    let words = |size: i32, colour: RGBColor| ("sans-serif", size).into_font().color(&colour);
    area.fill(&WHITE)?;
    let facts = trial.facts();
    let title = format!("{} against {}: {}", facts.challenger, facts.incumbent, trial.state().as_str());
    let mut chart = ChartBuilder::on(area)
        .margin(10)
        .caption(title, words(15, WORDS))
        .x_label_area_size(40)
        .y_label_area_size(50)
        .build_cartesian_2d(0.0..last, low..high)?;
    let footer = format!("fresh prompts ({} in {} nights)", trial.steps(), trial.nights());
    chart
        .configure_mesh()
        .disable_x_mesh()
        .max_light_lines(0)
        .bold_line_style(GRID)
        .label_style(words(12, WORDS))
        .axis_desc_style(words(13, WORDS))
        .x_desc(footer)
        .y_desc("ln W, the logarithm of the wealth")
        .draw()?;
    for (step, pair) in (1..).zip(points.windows(2)) {
        if pair[0].0 != pair[1].0 {
            let x = f64::from(step);
            chart.draw_series(LineSeries::new([(x, low), (x, high)], GRID))?;
            chart.draw_series([Text::new(format!("night {}", pair[1].0), (x, high), words(12, WORDS))])?;
        }
    }
    let lines = [
        (bar, BAR, format!("bar: ln W = {bar:.2}, W = {:.0}", bar.exp())),
        (futility, FUTILITY, format!("futility: {futility}")),
    ];
    for (at, colour, name) in lines {
        chart.draw_series(DashedLineSeries::new([(0.0, at), (last, at)], 6, 4, colour.stroke_width(1)))?;
        chart.draw_series([Text::new(name, (0.0, at), words(12, colour))])?;
    }
    let curve = (1..).zip(points).map(|(step, (_, value))| (f64::from(step), *value));
    chart.draw_series(LineSeries::new([(0.0, 0.0)].into_iter().chain(curve), CURVE.stroke_width(2)))?;
    Ok(())
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
        let svg = evidence(&driven.trial, &points).unwrap();
        let curve = svg.lines().find(|line| line.contains("polyline") && line.contains("#2266CC")).unwrap();
        assert_eq!(curve.matches(',').count(), points.len() + 1, "the start and each step: {curve}");
        assert!(svg.contains("night 2") && svg.contains("W = 1200") && svg.contains("a&lt;b&gt;&amp;&quot;c"), "{svg}");
        assert_eq!(svg.matches('<').count(), svg.matches('>').count());
        let none = evidence(&driven.trial, &[]).unwrap();
        assert!(!none.contains("NaN") && none.contains("futility: -2"), "{none}");
    }
}
