//! Progress reports of long-running work.

/// A progress report.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Progress<'a> {
    /// Name of the task, such as `hidden states`; reports of a task are consecutive.
    pub task: &'a str,
    /// Finished units.
    pub done: usize,
    /// Total units; may grow if not known in advance.
    pub total: usize,
    /// Loss of the last step of a training task.
    pub loss: Option<f64>,
}

impl<'a> Progress<'a> {
    /// A report without a loss.
    pub fn new(task: &'a str, done: usize, total: usize) -> Self {
        Self { task, done, total, loss: None }
    }
}

/// Receives progress reports.
pub type Observer<'a> = &'a mut dyn FnMut(Progress<'_>);
