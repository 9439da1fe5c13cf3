//! Finding the largest token budget that is fast enough, in few measurements.

use crate::error::Error;

/// Budgets measured over the whole range at first, about.
const COARSE: usize = 10;
/// Budgets measured anew at a time, to see whether they are as fast again.
const AGAIN: usize = 3;

/// How long a budget takes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Timing {
    /// Median seconds.
    pub(super) median: f64,
    /// Upper less lower quartile, over the median.
    pub(super) spread: f64,
    /// Timed runs.
    pub(super) runs: usize,
}

/// What a search came to: a budget by its index, and its last timing.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Found {
    /// The largest that is fast enough.
    Fits(usize, Timing),
    /// None is; this is the fastest.
    TooSlow(usize, Timing),
}

/// Searches `count` budgets, of which the first is the largest, for the first whose median is at most `limit` seconds.
/// `measure` times some of them, taking turns.
///
/// Time hardly ever grows where tokens are dropped, but it is noisy. So: some over the whole range; then all between the
/// first of these that is fast enough and the one before it; then those that were fast enough are measured anew, the largest
/// first, because the fastest of many noisy figures is too good. What is returned is from that last measurement.
///
/// # Errors
/// What `measure` reports.
pub(super) fn search(
    count: usize,
    limit: f64,
    mut measure: impl FnMut(&[usize]) -> Result<Vec<Timing>, Error>,
) -> Result<Option<Found>, Error> {
    let Some(last) = count.checked_sub(1) else {
        return Ok(None);
    };
    let mut fastest: Option<(usize, Timing)> = None;
    let mut timed = |budgets: &[usize]| {
        let timings = measure(budgets)?;
        for (&budget, &timing) in budgets.iter().zip(&timings) {
            if fastest.is_none_or(|(_, best)| timing.median < best.median) {
                fastest = Some((budget, timing));
            }
        }
        let fit = budgets.iter().copied().zip(timings);
        Ok::<Vec<(usize, Timing)>, Error>(fit.filter(|(_, t)| t.median <= limit).collect())
    };
    let mut coarse: Vec<usize> = (0..last).step_by(last.div_ceil(COARSE).max(1)).collect();
    coarse.push(last);
    if let Some(&(high, _)) = timed(&coarse)?.first() {
        let low = coarse.iter().take_while(|&&budget| budget < high).last();
        let between: Vec<usize> = (low.map_or(high, |low| low + 1)..high).collect();
        let mut again: Vec<usize> = if between.is_empty() {
            Vec::new()
        } else {
            timed(&between)?.iter().map(|&(budget, _)| budget).collect()
        };
        again.extend(high..=last);
        for few in again.chunks(AGAIN) {
            if let Some(&(budget, timing)) = timed(few)?.first() {
                return Ok(Some(Found::Fits(budget, timing)));
            }
        }
    }
    Ok(fastest.map(|(budget, timing)| Found::TooSlow(budget, timing)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Budgets that take `seconds`, and how often each was measured.
    fn find(seconds: &[f64], limit: f64) -> (Option<Found>, Vec<usize>) {
        let mut calls = vec![0; seconds.len()];
        let found = search(seconds.len(), limit, |budgets| {
            Ok(budgets
                .iter()
                .map(|&budget| {
                    calls[budget] += 1;
                    timing(seconds[budget])
                })
                .collect())
        });
        (found.unwrap(), calls)
    }

    fn timing(median: f64) -> Timing {
        Timing {
            median,
            spread: 0.0,
            runs: 1,
        }
    }

    /// Every limit of a range of every length: the first budget that is fast enough, without measuring most of the others.
    #[test]
    fn the_largest_budget_that_fits() {
        for count in [1, 2, 3, 10, 11, 12, 37, 97] {
            let seconds: Vec<f64> = (0..count).map(|budget| (count - budget) as f64).collect();
            for want in 0..count {
                for limit in [seconds[want], seconds[want] + 0.5] {
                    let (found, calls) = find(&seconds, limit);
                    assert_eq!(found, Some(Found::Fits(want, timing(seconds[want]))));
                    let measured = calls.iter().filter(|&&calls| calls > 0).count();
                    let most = 2 * COARSE + AGAIN + 2;
                    assert!(measured <= most, "{measured} of {count}");
                    assert!(calls[want] >= 2, "{want} of {count} was not measured anew");
                }
            }
            let (found, calls) = find(&seconds, 0.5);
            assert_eq!(found, Some(Found::TooSlow(count - 1, timing(1.0))));
            assert_eq!(calls[count - 1], 1);
        }
        assert_eq!(find(&[], 1.0).0, None);
    }

    /// A budget that was fast enough once, by luck, is not taken, and the figure that is given is the last one.
    #[test]
    fn luck_does_not_count() {
        let mut seen = [0; 8];
        let found = search(8, 4.5, |budgets| {
            Ok(budgets
                .iter()
                .map(|&budget| {
                    seen[budget] += 1;
                    timing(match (budget, seen[budget]) {
                        (2, 1) => 4.0,
                        (5, calls) => 4.0 + 0.1 * f64::from(calls),
                        (budget, _) => 8.0 - budget as f64 + f64::from(u8::from(budget < 5)),
                    })
                })
                .collect())
        });
        assert_eq!(found.unwrap(), Some(Found::Fits(5, timing(4.2))));
    }

    #[test]
    fn a_failure_is_passed_on() {
        let failed = search(3, 1.0, |_| Err(Error::backend("cpu", "gone")));
        assert!(failed.unwrap_err().to_string().contains("gone"));
    }
}
