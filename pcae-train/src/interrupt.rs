//! Stopping on SIGINT (Ctrl-C) and SIGTERM: the first asks, the second ends the process at once.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, LazyLock};

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;

static REQUESTED: LazyLock<Arc<AtomicBool>> = LazyLock::new(Arc::default);

/// Makes the signals set a flag for [`requested`] instead of ending the process. Call it once, before the work.
///
/// # Errors
/// If the system refuses the handlers.
pub fn install() -> io::Result<()> {
    for signal in [SIGINT, SIGTERM] {
        // The order matters: handlers run as registered, so on the first signal this one finds the flag unset.
        flag::register_conditional_default(signal, Arc::clone(&REQUESTED))?;
        flag::register(signal, Arc::clone(&REQUESTED))?;
    }
    Ok(())
}

/// Whether a signal has come since [`install`]: finish the step, save, leave.
pub fn requested() -> bool {
    REQUESTED.load(Ordering::Relaxed)
}

#[cfg(test)]
#[cfg(unix)]
mod tests {
    use std::os::unix::process::ExitStatusExt;
    use std::process::{Command, ExitStatus, Stdio};

    use signal_hook::low_level::raise;

    use super::*;

    const IS_CHILD: &str = "PCAE_TEST_IS_CHILD";
    /// Not the code of a test program that passed, failed or ran nothing.
    const BODY_RETURNED: i32 = 7;

    /// Runs `body` in a child process, since signals would reach the other tests of this one, and returns how it
    /// ended. The child is this program again, told to run `test` alone; if `body` returns there, it ends
    /// with the code `BODY_RETURNED`.
    fn in_child(test: &str, body: impl FnOnce()) -> ExitStatus {
        if std::env::var_os(IS_CHILD).is_some() {
            body();
            std::process::exit(BODY_RETURNED);
        }
        let child = Command::new(std::env::current_exe().unwrap())
            .args([&format!("interrupt::tests::{test}"), "--exact"])
            .env(IS_CHILD, "1")
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
        child.unwrap()
    }

    fn the_first_only_asks(test: &str, signal: i32) {
        let ended = in_child(test, || {
            install().unwrap();
            assert!(!requested());
            raise(signal).unwrap();
            assert!(requested());
        });
        assert_eq!(ended.code(), Some(BODY_RETURNED));
    }

    #[test]
    fn the_first_sigint_only_asks() {
        the_first_only_asks("the_first_sigint_only_asks", SIGINT);
    }

    #[test]
    fn the_first_sigterm_only_asks() {
        the_first_only_asks("the_first_sigterm_only_asks", SIGTERM);
    }

    #[test]
    fn the_second_signal_ends_the_process() {
        let ended = in_child("the_second_signal_ends_the_process", || {
            install().unwrap();
            raise(SIGINT).unwrap();
            raise(SIGTERM).unwrap();
        });
        assert_eq!(ended.signal(), Some(SIGTERM));
    }
}
