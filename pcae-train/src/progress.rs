//! Progress on standard error: a bar on a terminal, a line now and then elsewhere.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use indicatif::{FormattedDuration, ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Time between two lines where there is no terminal.
const LINE_INTERVAL: Duration = Duration::from_secs(5);
const BAR_TEMPLATE: &str = "{bar:30} {prefix} {pos}/{len}  {msg}";

/// The progress of a loop over steps, or over pictures.
pub struct Progress {
    unit: &'static str,
    started: Instant,
    start: u64,
    steps: u64,
    output: Output,
}

enum Output {
    Bar(ProgressBar),
    Lines(Lines),
}

impl Progress {
    /// Starts at step `start` (of a resumed run; else 0) on the way to `steps`.
    pub fn new(start: u64, steps: u64) -> Self {
        Self::of("step", start, steps)
    }

    /// The same for a loop over what is called `unit`.
    pub fn of(unit: &'static str, start: u64, steps: u64) -> Self {
        let output = if std::io::stderr().is_terminal() {
            // The default style is good enough should the template not parse.
            let style = ProgressStyle::with_template(BAR_TEMPLATE)
                .unwrap_or_else(|_| ProgressStyle::default_bar());
            let bar = ProgressBar::with_draw_target(Some(steps), ProgressDrawTarget::stderr());
            Output::Bar(bar.with_style(style).with_prefix(unit).with_position(start))
        } else {
            Output::Lines(Lines::new(Box::new(std::io::stderr())))
        };
        Self::with_output(unit, start, steps, output)
    }

    fn with_output(unit: &'static str, start: u64, steps: u64, output: Output) -> Self {
        Self {
            unit,
            started: Instant::now(),
            start,
            steps,
            output,
        }
    }

    /// Shows that `step` steps are done, the throughput in images per second, and the loss.
    pub fn set(&mut self, step: u64, images_per_s: f64, loss: f32) {
        self.set_at(Instant::now(), step, images_per_s, Some(loss));
    }

    /// Shows that `done` are done, and the throughput in images per second.
    pub fn count(&mut self, done: u64, images_per_s: f64) {
        self.set_at(Instant::now(), done, images_per_s, None);
    }

    fn set_at(&mut self, now: Instant, step: u64, images_per_s: f64, loss: Option<f32>) {
        let mut message = rate(images_per_s);
        if let Some(loss) = loss {
            message += &format!("  loss {loss:.4}");
        }
        if let Some(left) = self.time_left(now, step) {
            message += &format!("  ETA {}", FormattedDuration(left));
        }
        match &mut self.output {
            Output::Bar(bar) => {
                bar.set_message(message);
                bar.set_position(step);
            }
            Output::Lines(lines) => {
                let steps = self.steps;
                lines.set(now, format!("{} {step}/{steps}  {message}", self.unit));
            }
        }
    }

    /// From the average time of a step so far. The bar's own estimate takes the steps of earlier processes for done
    /// in no time.
    fn time_left(&self, now: Instant, step: u64) -> Option<Duration> {
        let done = step.checked_sub(self.start).filter(|&done| done > 0)?;
        let left = self.steps.checked_sub(step).filter(|&left| left > 0)?;
        let per_step = (now - self.started).as_secs_f64() / done as f64;
        Duration::try_from_secs_f64(per_step * left as f64).ok()
    }

    /// Writes a line of its own, above the bar.
    pub fn println(&mut self, line: &str) {
        match &mut self.output {
            Output::Bar(bar) => bar.println(line),
            Output::Lines(lines) => lines.write(line),
        }
    }

    /// Leaves the last state on the screen. Call it also when the loop ends early.
    pub fn finish(mut self) {
        match &mut self.output {
            Output::Bar(bar) => bar.abandon(),
            Output::Lines(lines) => lines.finish(),
        }
    }
}

/// Images per second in words. Slow models need decimals, fast ones would only flicker in them.
pub(crate) fn rate(images_per_s: f64) -> String {
    let decimals = match images_per_s {
        slow if slow < 1.0 => 3,
        medium if medium < 100.0 => 1,
        _ => 0,
    };
    format!("{images_per_s:.decimals$} images/s")
}

struct Lines {
    out: Box<dyn Write + Send>,
    /// When the next line is due; at once if none was written.
    due: Option<Instant>,
    /// The newest line, if it was not written.
    pending: Option<String>,
}

impl Lines {
    fn new(out: Box<dyn Write + Send>) -> Self {
        Self {
            out,
            due: None,
            pending: None,
        }
    }

    fn set(&mut self, now: Instant, line: String) {
        if self.due.is_some_and(|due| now < due) {
            self.pending = Some(line);
        } else {
            self.pending = None;
            self.write(&line);
            self.due = Some(now + LINE_INTERVAL);
        }
    }

    fn write(&mut self, line: &str) {
        // Training must not end because nobody reads its progress.
        let _ = writeln!(self.out, "{line}");
    }

    fn finish(&mut self) {
        if let Some(line) = self.pending.take() {
            self.write(&line);
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

    fn progress(start: u64, steps: u64) -> (Shared, Progress) {
        let out = Shared::default();
        let lines = Output::Lines(Lines::new(Box::new(out.clone())));
        (out, Progress::with_output("step", start, steps, lines))
    }

    fn text(out: &Shared) -> String {
        String::from_utf8(out.0.lock().unwrap().clone()).unwrap()
    }

    #[test]
    fn lines_come_at_intervals_and_at_the_end() {
        let (out, mut progress) = progress(100, 200);
        let second = Duration::from_secs(1);
        let started = progress.started;
        for i in 1..=10 {
            progress.set_at(started + second * i, 100 + u64::from(i), 850.4, Some(0.5));
        }
        progress.println("saved");
        progress.finish();
        let want = "\
            step 101/200  850 images/s  loss 0.5000  ETA 00:01:39\n\
            step 106/200  850 images/s  loss 0.5000  ETA 00:01:34\n\
            saved\n\
            step 110/200  850 images/s  loss 0.5000  ETA 00:01:30\n";
        assert_eq!(text(&out), want);
    }

    #[test]
    fn a_line_that_was_written_is_not_repeated_at_the_end() {
        let (out, mut progress) = progress(0, 3);
        progress.set(3, 2.345, 1.0);
        progress.finish();
        assert_eq!(text(&out), "step 3/3  2.3 images/s  loss 1.0000\n");
    }

    #[test]
    fn slow_models_have_decimals() {
        for (images_per_s, want) in [
            (0.04, "0.040 images/s"),
            (0.4, "0.400 images/s"),
            (2.345, "2.3 images/s"),
            (850.4, "850 images/s"),
        ] {
            assert_eq!(rate(images_per_s), want);
        }
    }

    #[test]
    fn odd_values_are_shown() {
        let (out, mut progress) = progress(5, 3);
        progress.set(4, f64::NAN, f32::NAN);
        assert_eq!(text(&out), "step 4/3  NaN images/s  loss NaN\n");
    }

    #[test]
    fn the_template_of_the_bar_parses() {
        ProgressStyle::with_template(BAR_TEMPLATE).unwrap();
    }
}
