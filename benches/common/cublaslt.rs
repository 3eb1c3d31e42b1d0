//! The peer of products: cuBLASLt, opened at run time where the machine has it. The algorithm is the first of its own
//! heuristic's, with 32 MiB of workspace.

use super::shapes::Scale;
use cudarc::cublaslt::{result as lt, sys};
use std::ffi::c_void;
use std::rc::Rc;
use swat::backend::cuda::{Cuda, GemmLayout, GemmShape, Precision};
use swat::backend::{Backend, Buffer, FloatElement};

const WORKSPACE_BYTES: usize = 32 << 20;

/// The library on a device.
pub struct CublasLt<P: Precision> {
    cuda: Cuda<P>,
    handle: sys::cublasLtHandle_t,
    workspace: Buffer<Cuda<P>, u32>,
}

impl<P: Precision> CublasLt<P> {
    /// `None` where the library is not looked for, is not found, or does not start.
    pub fn open(cuda: &Cuda<P>, scale: &Scale) -> Option<Rc<Self>> {
        // SAFETY: only opens the library.
        if !scale.libraries || !unsafe { sys::is_culib_present() } {
            return None;
        }
        cuda.stream().ok()?;
        let handle = lt::create_handle().ok()?;
        let workspace = cuda.zeros(WORKSPACE_BYTES / 4).ok()?;
        Some(Rc::new(Self { cuda: cuda.clone(), handle, workspace }))
    }

    /// C = A·B, C of `T`.
    ///
    /// # Panics
    /// Where the library refuses the shape.
    pub fn product<T: FloatElement>(self: &Rc<Self>, shape: GemmShape) -> Product<P> {
        let GemmShape { layout, m, n, k } = shape;
        // The library's matrices are columns after columns: what is computed is Cᵀ [n, m] = Bᵀ·Aᵀ, of the transposes that
        // rows after rows are.
        let [transpose_b, transpose_a] = match layout {
            GemmLayout::Tn => [true, false],
            GemmLayout::Nn => [false, false],
            GemmLayout::Nt => [false, true],
        };
        let output = if T::NAME == "f32" { sys::cudaDataType::CUDA_R_32F } else { sys::cudaDataType::CUDA_R_16BF };
        let matrix = |element, transposed: bool, rows: usize, columns: usize| {
            let (rows, columns) = if transposed { (columns, rows) } else { (rows, columns) };
            lt::create_matrix_layout(element, rows as u64, columns as u64, rows as i64).expect("a matrix")
        };
        let b = matrix(sys::cudaDataType::CUDA_R_16BF, transpose_b, n, k);
        let a = matrix(sys::cudaDataType::CUDA_R_16BF, transpose_a, k, m);
        let c = matrix(output, false, n, m);
        let (compute, scale) = (sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, sys::cudaDataType::CUDA_R_32F);
        let product = lt::create_matmul_desc(compute, scale).expect("a product");
        let preference = lt::create_matmul_pref().expect("a preference");
        let (which_b, which_a, most) = (
            sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA,
            sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSB,
            sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
        );
        let workspace = WORKSPACE_BYTES;
        // SAFETY: descriptors that were just made; attributes of the sizes that they have, which the calls copy.
        let algorithm = unsafe {
            for (which, transposed) in [(which_b, transpose_b), (which_a, transpose_a)] {
                let operation = i32::from(transposed);
                lt::set_matmul_desc_attribute(product, which, (&raw const operation).cast(), 4).expect("a transpose");
            }
            lt::set_matmul_pref_attribute(preference, most, (&raw const workspace).cast(), 8).expect("a size");
            let found = lt::get_matmul_algo_heuristic(self.handle, product, b, a, c, c, preference);
            lt::destroy_matmul_pref(preference).expect("a preference");
            found.unwrap_or_else(|error| panic!("cublaslt refuses {shape:?}: {error}")).algo
        };
        Product { library: self.clone(), product, matrices: [b, a, c], algorithm }
    }
}

impl<P: Precision> Drop for CublasLt<P> {
    fn drop(&mut self) {
        // SAFETY: a handle that nothing uses any more.
        let _ = unsafe { lt::destroy_handle(self.handle) };
    }
}

/// A product of one shape.
pub struct Product<P: Precision> {
    library: Rc<CublasLt<P>>,
    product: sys::cublasLtMatmulDesc_t,
    matrices: [sys::cublasLtMatrixLayout_t; 3],
    algorithm: sys::cublasLtMatmulAlgo_t,
}

impl<P: Precision> Product<P> {
    /// Queues it.
    ///
    /// # Panics
    /// Where the library fails.
    pub fn run<T: FloatElement>(
        &self,
        a: &Buffer<Cuda<P>, half::bf16>,
        b: &Buffer<Cuda<P>, half::bf16>,
        c: &mut Buffer<Cuda<P>, T>,
    ) {
        let CublasLt { cuda, handle, workspace } = &*self.library;
        let stream = cuda.stream().expect("a working device");
        let [map_b, map_a, map_c] = self.matrices;
        let (alpha, beta) = (1f32, 0f32);
        let scalar = |x: &f32| std::ptr::from_ref(x).cast::<c_void>();
        let (a, b) = (cuda.address(&a.view()) as *const c_void, cuda.address(&b.view()) as *const c_void);
        let (c, space) = (cuda.address(&c.view()) as *mut c_void, cuda.address(&workspace.view()) as *mut c_void);
        // SAFETY: the matrices are described as they lie in these buffers; C is borrowed mutably; the workspace is as large
        // as the heuristic was told; scalars are read before the call returns.
        unsafe {
            lt::matmul(
                *handle,
                self.product,
                scalar(&alpha),
                scalar(&beta),
                b,
                map_b,
                a,
                map_a,
                c,
                map_c,
                c,
                map_c,
                &self.algorithm,
                space,
                WORKSPACE_BYTES,
                stream.cast(),
            )
        }
        .expect("cublaslt");
    }
}

impl<P: Precision> Drop for Product<P> {
    fn drop(&mut self) {
        // SAFETY: descriptors that nothing uses any more.
        unsafe {
            let _ = lt::destroy_matmul_desc(self.product);
            for matrix in self.matrices {
                let _ = lt::destroy_matrix_layout(matrix);
            }
        }
    }
}
