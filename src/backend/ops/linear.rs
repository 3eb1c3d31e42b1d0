//! Linear layers: products with a weight, alone and several with the same input, and their gradients.

use super::Operator;
use crate::backend::cost::{self, LinearShape};
use crate::backend::{Backend, Cost, In, Out, View, ViewMut, trace};
use crate::error::Result;

impl LinearShape {
    /// Asserts the elements of tensors like X, W and Y.
    #[track_caller]
    fn check(self, x: usize, w: usize, y: usize) {
        let Self { tokens, inputs, outputs } = self;
        assert_eq!([x, w, y], [tokens * inputs, outputs * inputs, tokens * outputs], "{self:?}");
    }

    /// Several layers with one X or one dX of `x` elements, as one layer. `layers` are the elements of each W and Y.
    #[track_caller]
    fn concatenated(tokens: usize, x: usize, layers: impl Iterator<Item = (usize, usize)>) -> Self {
        let inputs = x / tokens.max(1);
        assert!(tokens > 0 && inputs > 0 && x == tokens * inputs, "{x} inputs of {tokens} tokens");
        let outputs = layers.map(|(w, y)| {
            let outputs = w / inputs;
            assert_eq!([w, y], [outputs * inputs, tokens * outputs], "{tokens} tokens, {inputs} inputs");
            outputs
        });
        Self { tokens, inputs, outputs: outputs.sum() }
    }
}

/// What becomes of a product before it is stored: `y = alpha·x·wᵀ + bias + residual (+ y)`. `V` is a backend's view.
#[derive(Clone, Copy, Debug)]
pub struct Epilogue<V> {
    /// Factor on the product, 1 by default.
    pub alpha: f32,
    /// \[outputs\]
    pub bias: Option<V>,
    /// [tokens, outputs]
    pub residual: Option<V>,
    /// Adds to what `y` holds.
    pub accumulate: bool,
}

impl<V> Default for Epilogue<V> {
    fn default() -> Self {
        Self { alpha: 1.0, bias: None, residual: None, accumulate: false }
    }
}

impl<V> Epilogue<V> {
    /// The same with its views converted.
    pub fn map<'s, U>(&'s self, convert: impl Fn(&'s V) -> U) -> Epilogue<U> {
        Epilogue {
            alpha: self.alpha,
            bias: self.bias.as_ref().map(&convert),
            residual: self.residual.as_ref().map(&convert),
            accumulate: self.accumulate,
        }
    }
}

/// Y [tokens, outputs] = epilogue(X [tokens, inputs] · Wᵀ), W [outputs, inputs].
pub struct Linear<'a, B: Backend> {
    /// [tokens, inputs]
    pub x: In<'a, B>,
    /// [outputs, inputs]
    pub w: In<'a, B>,
    /// [tokens, outputs]
    pub y: Out<'a, B>,
    /// Sizes.
    pub shape: LinearShape,
    /// Scaling and addends.
    pub epilogue: Epilogue<In<'a, B>>,
}

impl<'a, B: Backend> Linear<'a, B> {
    /// The product alone.
    pub fn new(x: In<'a, B>, w: In<'a, B>, y: Out<'a, B>, shape: LinearShape) -> Self {
        Self { x, w, y, shape, epilogue: Epilogue::default() }
    }
}

impl<B: Backend> Operator<B> for Linear<'_, B> {
    const NAME: &'static str = "linear";

    fn check(&self) {
        self.shape.check(self.x.len(), self.w.len(), self.y.len());
        let Epilogue { bias, residual, .. } = &self.epilogue;
        assert!(bias.as_ref().is_none_or(|bias| bias.len() == self.shape.outputs), "{:?}", self.shape);
        assert!(residual.as_ref().is_none_or(|residual| residual.len() == self.y.len()), "{:?}", self.shape);
    }

    fn cost(&self) -> Cost {
        let Epilogue { bias, residual, accumulate, .. } = &self.epilogue;
        let added = bias.as_ref().map_or(0, View::len) + residual.as_ref().map_or(0, View::len);
        let old = if *accumulate { self.y.len() } else { 0 };
        cost::linear(self.shape, added + old, size_of::<B::Float>())
    }

    fn launch(self, backend: &B) -> Result<()> {
        backend.linear(self)
    }
}

/// One of several linear layers of the same X.
pub struct Projection<'a, B: Backend> {
    /// [outputs, inputs]
    pub w: In<'a, B>,
    /// \[outputs\]
    pub bias: Option<In<'a, B>>,
    /// [tokens, outputs]
    pub y: Out<'a, B>,
}

/// Several layers of one X (q, k and v; gate and up): each Y = X·Wᵀ + bias.
pub struct LinearEach<'a, B: Backend> {
    /// [tokens, inputs]
    pub x: In<'a, B>,
    /// At least one.
    pub layers: &'a mut [Projection<'a, B>],
    /// Rows of X, at least 1.
    pub tokens: usize,
}

impl<B: Backend> LinearEach<'_, B> {
    /// All layers as one.
    pub fn shape(&self) -> LinearShape {
        let layers = self.layers.iter().map(|layer| (layer.w.len(), layer.y.len()));
        LinearShape::concatenated(self.tokens, self.x.len(), layers)
    }
}

impl<B: Backend> Operator<B> for LinearEach<'_, B> {
    const NAME: &'static str = "linear_each";

    fn check(&self) {
        let inputs = self.shape().inputs;
        for Projection { w, bias, .. } in &*self.layers {
            assert!(bias.as_ref().is_none_or(|bias| bias.len() == w.len() / inputs));
        }
    }

    fn cost(&self) -> Cost {
        let biases = self.layers.iter().filter_map(|layer| layer.bias.as_ref()).map(View::len).sum();
        cost::linear(self.shape(), biases, size_of::<B::Float>())
    }

    fn launch(self, backend: &B) -> Result<()> {
        backend.linear_each(self)
    }
}

/// Y = silu(X·gateᵀ) · (X·upᵀ) without the two products in memory; the same bits as [`LinearEach`] and
/// [`SwiGlu`](super::SwiGlu). Y stays as it was where the backend has no kernel for these tensors.
pub struct GatedLinear<'a, B: Backend> {
    /// [tokens, inputs]
    pub x: In<'a, B>,
    /// [outputs, inputs]
    pub gate: In<'a, B>,
    /// [outputs, inputs]
    pub up: In<'a, B>,
    /// [tokens, outputs]
    pub y: Out<'a, B>,
    /// Rows of X, at least 1.
    pub tokens: usize,
}

impl<B: Backend> GatedLinear<'_, B> {
    /// Sizes of either product.
    pub fn shape(&self) -> LinearShape {
        LinearShape::concatenated(self.tokens, self.x.len(), std::iter::once((self.gate.len(), self.y.len())))
    }

    /// As [`Operator::run`]; returns whether the backend has a kernel for these tensors, and leaves no span where it
    /// has none.
    ///
    /// # Errors
    /// [`crate::error::Error::Device`] or [`crate::error::Error::Memory`] where the device fails.
    ///
    /// # Panics
    /// Where shapes do not fit.
    pub fn run(self, backend: &B) -> Result<bool> {
        let shape = self.shape();
        assert_eq!(self.up.len(), self.gate.len(), "{shape:?}");
        let span = trace::op("gated_linear", || cost::gated_linear(shape, size_of::<B::Float>()));
        let done = backend.gated_linear(self)?;
        if !done {
            span.cancel();
        }
        Ok(done)
    }
}

/// dX = alpha · dY · W (+ dX).
pub struct LinearBackwardInput<'a, B: Backend> {
    /// [tokens, outputs]
    pub dy: In<'a, B>,
    /// [outputs, inputs]
    pub w: In<'a, B>,
    /// [tokens, inputs]
    pub dx: Out<'a, B>,
    /// Sizes.
    pub shape: LinearShape,
    /// Factor on the product.
    pub alpha: f32,
    /// Adds to what `dx` holds.
    pub accumulate: bool,
}

impl<'a, B: Backend> LinearBackwardInput<'a, B> {
    /// The product alone.
    pub fn new(dy: In<'a, B>, w: In<'a, B>, dx: Out<'a, B>, shape: LinearShape) -> Self {
        Self { dy, w, dx, shape, alpha: 1.0, accumulate: false }
    }
}

impl<B: Backend> Operator<B> for LinearBackwardInput<'_, B> {
    const NAME: &'static str = "linear_backward_input";

    fn check(&self) {
        self.shape.check(self.dx.len(), self.w.len(), self.dy.len());
    }

    fn cost(&self) -> Cost {
        let float = size_of::<B::Float>();
        let old = if self.accumulate { self.dx.len() } else { 0 };
        cost::linear_backward_input(self.shape, float) + Cost::moved(old * float)
    }

    fn launch(self, backend: &B) -> Result<()> {
        backend.linear_backward_input(self)
    }
}

/// dW = alpha · dYᵀ · X (+ dW).
pub struct LinearBackwardWeight<'a, B: Backend> {
    /// [tokens, outputs]
    pub dy: In<'a, B>,
    /// [tokens, inputs]
    pub x: In<'a, B>,
    /// [outputs, inputs]
    pub dw: ViewMut<'a, B, B::Grad>,
    /// Sizes.
    pub shape: LinearShape,
    /// Factor on the product.
    pub alpha: f32,
    /// Adds to what `dw` holds.
    pub accumulate: bool,
}

impl<'a, B: Backend> LinearBackwardWeight<'a, B> {
    /// The product alone.
    pub fn new(dy: In<'a, B>, x: In<'a, B>, dw: ViewMut<'a, B, B::Grad>, shape: LinearShape) -> Self {
        Self { dy, x, dw, shape, alpha: 1.0, accumulate: false }
    }
}

impl<B: Backend> Operator<B> for LinearBackwardWeight<'_, B> {
    const NAME: &'static str = "linear_backward_weight";

    fn check(&self) {
        self.shape.check(self.x.len(), self.dw.len(), self.dy.len());
    }

    fn cost(&self) -> Cost {
        let (float, grad) = (size_of::<B::Float>(), size_of::<B::Grad>());
        let old = if self.accumulate { self.dw.len() } else { 0 };
        cost::linear_backward_weight(self.shape, float, grad) + Cost::moved(old * grad)
    }

    fn launch(self, backend: &B) -> Result<()> {
        backend.linear_backward_weight(self)
    }
}

/// One of several linear layers with the same input: its term of the gradient of that input.
pub struct InputGradient<'a, B: Backend> {
    /// [tokens, outputs]
    pub dy: In<'a, B>,
    /// [outputs, inputs]
    pub w: In<'a, B>,
}

/// Gradient of the input of [`LinearEach`]: dX = Σ dY·W over the layers (+ dX).
pub struct LinearBackwardInputEach<'a, B: Backend> {
    /// At least one.
    pub layers: &'a [InputGradient<'a, B>],
    /// [tokens, inputs]
    pub dx: Out<'a, B>,
    /// Rows of dX, at least 1.
    pub tokens: usize,
    /// Adds to what `dx` holds.
    pub accumulate: bool,
}

impl<B: Backend> LinearBackwardInputEach<'_, B> {
    /// All layers as one.
    pub fn shape(&self) -> LinearShape {
        let layers = self.layers.iter().map(|layer| (layer.w.len(), layer.dy.len()));
        LinearShape::concatenated(self.tokens, self.dx.len(), layers)
    }
}

impl<B: Backend> Operator<B> for LinearBackwardInputEach<'_, B> {
    const NAME: &'static str = "linear_backward_input_each";

    fn check(&self) {
        self.shape();
    }

    fn cost(&self) -> Cost {
        let float = size_of::<B::Float>();
        let old = if self.accumulate { self.dx.len() } else { 0 };
        cost::linear_backward_input(self.shape(), float) + Cost::moved(old * float)
    }

    fn launch(self, backend: &B) -> Result<()> {
        backend.linear_backward_input_each(self)
    }
}

/// One of several linear layers of the same X: the gradient of its weight.
pub struct WeightGradient<'a, B: Backend> {
    /// [tokens, outputs]
    pub dy: In<'a, B>,
    /// [outputs, inputs]
    pub dw: ViewMut<'a, B, B::Grad>,
}

/// Gradients of the weights of [`LinearEach`]: each dW = dYᵀ·X (+ dW).
pub struct LinearBackwardWeightEach<'a, B: Backend> {
    /// [tokens, inputs]
    pub x: In<'a, B>,
    /// At least one.
    pub layers: &'a mut [WeightGradient<'a, B>],
    /// Rows of X, at least 1.
    pub tokens: usize,
    /// Adds to what each `dw` holds.
    pub accumulate: bool,
}

impl<B: Backend> LinearBackwardWeightEach<'_, B> {
    /// All layers as one.
    pub fn shape(&self) -> LinearShape {
        let layers = self.layers.iter().map(|layer| (layer.dw.len(), layer.dy.len()));
        LinearShape::concatenated(self.tokens, self.x.len(), layers)
    }
}

impl<B: Backend> Operator<B> for LinearBackwardWeightEach<'_, B> {
    const NAME: &'static str = "linear_backward_weight_each";

    fn check(&self) {
        self.shape();
    }

    fn cost(&self) -> Cost {
        let (shape, grad) = (self.shape(), size_of::<B::Grad>());
        let old = if self.accumulate { shape.inputs * shape.outputs } else { 0 };
        cost::linear_backward_weight(shape, size_of::<B::Float>(), grad) + Cost::moved(old * grad)
    }

    fn launch(self, backend: &B) -> Result<()> {
        backend.linear_backward_weight_each(self)
    }
}

/// dbias = column sums of dY (+ dbias).
pub struct LinearBackwardBias<'a, B: Backend> {
    /// [tokens, outputs]
    pub dy: In<'a, B>,
    /// \[outputs\]
    pub dbias: ViewMut<'a, B, B::Grad>,
    /// Adds to what `dbias` holds.
    pub accumulate: bool,
}

impl<B: Backend> Operator<B> for LinearBackwardBias<'_, B> {
    const NAME: &'static str = "linear_backward_bias";

    fn check(&self) {
        assert!(self.dy.len().is_multiple_of(self.dbias.len()), "{} columns", self.dbias.len());
    }

    fn cost(&self) -> Cost {
        let (outputs, grad) = (self.dbias.len(), size_of::<B::Grad>());
        let old = if self.accumulate { outputs } else { 0 };
        cost::linear_backward_bias(self.dy.len(), outputs, size_of::<B::Float>(), grad) + Cost::moved(old * grad)
    }

    fn launch(self, backend: &B) -> Result<()> {
        backend.linear_backward_bias(self)
    }
}
