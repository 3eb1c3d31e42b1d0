//! SIGINT, SIGTERM, SIGHUP, and those by which schedulers and limits announce the end (SIGUSR1, SIGUSR2, SIGXCPU), during
//! work that can be saved: the first asks for a checkpoint, a second one ends the process at once. Where a file would
//! exceed a limit of its size, writing fails in place of SIGXFSZ.
//!
//! Signals belong to a process: the binary calls [`watch`] once; in a program that does not, [`asked`] is always none.
//! A signal that the process was started to ignore, as by `nohup`, stays ignored.

#[cfg(unix)]
mod unix {
    use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR1, SIGUSR2, SIGXCPU, SIGXFSZ};
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
    use std::sync::{Arc, OnceLock};

    /// What the handlers share with the work.
    struct Watch {
        /// The last signal; 0 = none.
        signal: Arc<AtomicUsize>,
        /// Whether the next signal has its default effect.
        at_once: Arc<AtomicBool>,
    }

    static WATCH: OnceLock<Watch> = OnceLock::new();

    pub(super) fn watch() {
        WATCH.get_or_init(|| {
            let watch = Watch { signal: Arc::default(), at_once: Arc::new(AtomicBool::new(true)) };
            let ignored = ignored();
            for signal in [SIGINT, SIGTERM, SIGHUP, SIGUSR1, SIGUSR2, SIGXCPU] {
                if ignored & 1 << (signal - 1) != 0 {
                    continue;
                }
                // In this order: the default effect is decided before the first signal turns it on again. A handler
                // that cannot be registered leaves the default effect.
                let _ = signal_hook::flag::register_conditional_default(signal, watch.at_once.clone())
                    .and_then(|_| signal_hook::flag::register_usize(signal, watch.signal.clone(), signal as usize))
                    .and_then(|_| signal_hook::flag::register(signal, watch.at_once.clone()));
            }
            // Caught, it leaves an error of the file.
            let _ = signal_hook::flag::register(SIGXFSZ, Arc::default());
            watch
        });
    }

    /// The mask of ignored signals; 0 where the system does not say.
    fn ignored() -> u64 {
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
        mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0)
    }

    pub(super) fn asked() -> Option<i32> {
        let signal = WATCH.get()?.signal.load(Ordering::Relaxed);
        (signal != 0).then_some(signal as i32)
    }

    pub(super) fn set_at_once(at_once: bool) {
        if let Some(watch) = WATCH.get() {
            watch.at_once.store(at_once, Ordering::Relaxed);
        }
    }
}

/// Registers the handlers. Outside of a [`Section`], signals keep their default effect.
pub fn watch() {
    #[cfg(unix)]
    unix::watch();
}

/// The signal that has asked the work of a [`Section`] to end.
pub fn asked() -> Option<i32> {
    #[cfg(unix)]
    return unix::asked();
    #[cfg(not(unix))]
    None
}

/// Sends a signal to this process.
pub(crate) fn raise(signal: i32) {
    #[cfg(unix)]
    let raised = signal_hook::low_level::raise(signal).is_ok();
    #[cfg(not(unix))]
    let raised = false;
    if !raised {
        std::process::exit(128 + signal);
    }
}

/// Work that polls [`asked`]; until it is dropped, the first signal only asks.
#[derive(Debug)]
#[must_use]
pub struct Section(());

impl Section {
    /// Begins the work.
    pub fn begin() -> Self {
        #[cfg(unix)]
        unix::set_at_once(false);
        Self(())
    }
}

impl Drop for Section {
    fn drop(&mut self) {
        #[cfg(unix)]
        unix::set_at_once(true);
    }
}
