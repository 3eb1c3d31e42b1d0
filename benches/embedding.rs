//! Embedding rows: gather, scatter, and the gradient of the table.

use super::common::{Device, Session, integers, random};
use std::cell::{OnceCell, RefCell};
use std::rc::Rc;
use swat::backend::cpu::Cpu;
use swat::backend::cuda::{Cuda, F32State};
use swat::backend::{EmbeddingBackward, GatherRows, Operator, ScatterRows, cost};

pub(crate) fn cpu(session: &mut Session, cpu: &Cpu) {
    embedding(session, cpu, &[], &[]);
}

pub(crate) fn cuda(session: &mut Session, cuda: &Cuda<F32State>) {
    // Up to 128 rows the backward pass has only its baseline.
    let backward: &[_] = if session.scale.tokens > 128 { &["baseline", "short"] } else { &["baseline"] };
    embedding(session, cuda, &["baseline", "vec8"], backward);
}

fn embedding<D: Device>(
    session: &mut Session,
    device: &D,
    versions: &[&'static str],
    backward_versions: &[&'static str],
) {
    let (tokens, table_rows) = (session.scale.tokens, session.scale.table_rows);
    for model in session.scale.models() {
        let (width, len) = (model.hidden, tokens * model.hidden);
        let shape = format!("{}/{tokens}x{width}", model.name);
        // All calls share the table; each takes other rows.
        let draws = RefCell::new(0);
        let next_rows = |d: &D, step: usize| {
            let first = draws.replace_with(|first| *first + tokens * step);
            integers(d, (0..tokens).map(|i| ((first + i * step) % table_rows) as u32))
        };
        let moved = cost::move_rows(tokens, width, size_of::<D::Float>());
        let table = OnceCell::new();
        let make = |d: &D| {
            let table = table.get_or_init(|| Rc::new(RefCell::new(random::<D, D::Float>(d, table_rows * width))));
            // An odd step: all rows are different.
            (table.clone(), next_rows(d, 7919), random::<D, D::Float>(d, len))
        };
        let ladder = session.ladder(device, "gather", &shape, moved, make);
        let ladder = ladder.versions(versions, |d, (table, rows, to)| {
            GatherRows { from: table.borrow().view(), rows: rows.view(), to: to.view_mut(), width }
                .run(d)
                .expect("a working device");
        });
        ladder.copy().run();
        let ladder = session.ladder(device, "scatter", &shape, moved, make);
        let ladder = ladder.versions(versions, |d, (table, rows, from)| {
            let mut table = table.borrow_mut();
            ScatterRows { from: from.view(), rows: rows.view(), to: table.view_mut(), width }
                .run(d)
                .expect("a working device");
        });
        ladder.copy().run();

        let cost = cost::add_rows(tokens, width, size_of::<D::Float>(), size_of::<D::Grad>());
        let gradients = OnceCell::new();
        let make = |d: &D| {
            let table = gradients.get_or_init(|| Rc::new(RefCell::new(random::<D, D::Grad>(d, table_rows * width))));
            // Every sixteenth row, so that rows repeat as tokens of a text do.
            (table.clone(), next_rows(d, 16), random::<D, D::Float>(d, len))
        };
        let ladder = session.ladder(device, "backward", &shape, cost, make);
        let ladder = ladder.versions(backward_versions, |d, (table, rows, dy)| {
            let mut table = table.borrow_mut();
            EmbeddingBackward { dy: dy.view(), rows: rows.view(), dtable: table.view_mut(), width }
                .run(d)
                .expect("a working device");
        });
        ladder.copy().run();
    }
}
