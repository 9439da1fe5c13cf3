//! Progress on standard error: a bar on a terminal, a line now and then elsewhere.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use indicatif::{FormattedDuration, ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Time between two lines where there is no terminal.
const LINE_INTERVAL: Duration = Duration::from_secs(5);
const BAR_TEMPLATE: &str = "{bar:30} {pos}/{len} steps  {msg}  ETA {eta_precise}";

/// The progress of a loop over steps.
pub struct Progress(Style);

enum Style {
    Bar(ProgressBar),
    Lines(Lines),
}

impl Progress {
    /// Starts at step `start` (of a resumed run; else 0) on the way to `steps`.
    pub fn new(start: u64, steps: u64) -> Self {
        if !std::io::stderr().is_terminal() {
            let out = Box::new(std::io::stderr());
            return Self(Style::Lines(Lines::new(out, start, steps)));
        }
        // The default style is good enough should the template not parse.
        let style = ProgressStyle::with_template(BAR_TEMPLATE)
            .unwrap_or_else(|_| ProgressStyle::default_bar());
        let bar = ProgressBar::with_draw_target(Some(steps), ProgressDrawTarget::stderr())
            .with_style(style)
            .with_position(start);
        // Else the steps of earlier processes would count as done in no time.
        bar.reset_eta();
        Self(Style::Bar(bar))
    }

    /// Shows that `step` steps are done, the throughput in images per second, and the loss.
    pub fn set(&mut self, step: u64, images_per_s: f64, loss: f32) {
        match &mut self.0 {
            Style::Bar(bar) => {
                bar.set_message(message(images_per_s, loss));
                bar.set_position(step);
            }
            Style::Lines(lines) => lines.set(Instant::now(), step, images_per_s, loss),
        }
    }

    /// Writes a line of its own, above the bar.
    pub fn println(&mut self, line: &str) {
        match &mut self.0 {
            Style::Bar(bar) => bar.println(line),
            Style::Lines(lines) => lines.println(line),
        }
    }

    /// Leaves the last state on the screen. Call it also when the loop ends early.
    pub fn finish(mut self) {
        match &mut self.0 {
            Style::Bar(bar) => bar.abandon(),
            Style::Lines(lines) => lines.finish(),
        }
    }
}

fn message(images_per_s: f64, loss: f32) -> String {
    // Slow models need the decimal, fast ones would only flicker in it.
    let decimals = usize::from(images_per_s < 100.0);
    format!("{images_per_s:.decimals$} images/s  loss {loss:.4}")
}

struct Lines {
    out: Box<dyn Write + Send>,
    started: Instant,
    start: u64,
    steps: u64,
    /// When the next line is due.
    due: Instant,
    /// The newest state, if it was not written.
    pending: Option<String>,
}

impl Lines {
    fn new(out: Box<dyn Write + Send>, start: u64, steps: u64) -> Self {
        let now = Instant::now();
        Self {
            out,
            started: now,
            start,
            steps,
            due: now,
            pending: None,
        }
    }

    fn set(&mut self, now: Instant, step: u64, images_per_s: f64, loss: f32) {
        let steps = self.steps;
        let mut line = format!("step {step}/{steps}  {}", message(images_per_s, loss));
        let done = step.saturating_sub(self.start);
        if done > 0 && step < steps {
            let per_step = (now - self.started).as_secs_f64() / done as f64;
            // Whole seconds; a time too long for `Duration` is not worth showing.
            let left = (per_step * (steps - step) as f64).round();
            if let Ok(left) = Duration::try_from_secs_f64(left) {
                line += &format!("  ETA {}", FormattedDuration(left));
            }
        }
        if now < self.due {
            self.pending = Some(line);
        } else {
            self.pending = None;
            self.println(&line);
            self.due = now + LINE_INTERVAL;
        }
    }

    fn println(&mut self, line: &str) {
        // Training must not end because nobody reads its progress.
        let _ = writeln!(self.out, "{line}");
    }

    fn finish(&mut self) {
        if let Some(line) = self.pending.take() {
            self.println(&line);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    #[derive(Clone, Default)]
    struct Shared(Arc<Mutex<Vec<u8>>>);

    impl Write for Shared {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn lines_come_at_intervals_and_at_the_end() {
        let out = Shared::default();
        let mut lines = Lines::new(Box::new(out.clone()), 100, 200);
        let second = Duration::from_secs(1);
        let started = lines.started;
        for i in 1..=10 {
            lines.set(started + second * i, 100 + u64::from(i), 850.4, 0.5);
        }
        lines.println("saved");
        lines.finish();
        lines.finish();
        let text = String::from_utf8(out.0.lock().unwrap().clone()).unwrap();
        let want = "\
            step 101/200  850 images/s  loss 0.5000  ETA 00:01:39\n\
            step 106/200  850 images/s  loss 0.5000  ETA 00:01:34\n\
            saved\n\
            step 110/200  850 images/s  loss 0.5000  ETA 00:01:30\n";
        assert_eq!(text, want);
    }

    #[test]
    fn the_last_step_and_odd_values_are_shown() {
        let out = Shared::default();
        let mut lines = Lines::new(Box::new(out.clone()), 0, 1);
        lines.set(lines.started, 1, f64::NAN, f32::NAN);
        let text = String::from_utf8(out.0.lock().unwrap().clone()).unwrap();
        assert_eq!(text, "step 1/1  NaN images/s  loss NaN\n");
    }

    #[test]
    fn the_template_of_the_bar_parses() {
        ProgressStyle::with_template(BAR_TEMPLATE).unwrap();
    }

    #[test]
    fn slow_throughput_has_a_decimal() {
        assert_eq!(message(2.345, 1.0), "2.3 images/s  loss 1.0000");
    }
}
