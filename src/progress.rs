//! What long-running work reports while it runs.

/// A report: `done` of `total` units of a task.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Progress<'a> {
    /// What is being done, such as `hidden states`; reports of one task come one after another.
    pub task: &'a str,
    /// Units done.
    pub done: usize,
    /// Units in all; may still grow where they are not known in advance.
    pub total: usize,
    /// Loss of the last step, of a task that trains.
    pub loss: Option<f64>,
}

impl<'a> Progress<'a> {
    /// A report of a task that has no loss.
    pub fn new(task: &'a str, done: usize, total: usize) -> Self {
        Self { task, done, total, loss: None }
    }
}

/// Is told of progress.
pub type Observer<'a> = &'a mut dyn FnMut(Progress<'_>);
